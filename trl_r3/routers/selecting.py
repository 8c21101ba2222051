"""Which of the top-k calls of a mixture block selects its experts, by what the experts were given.

Legend: N tokens of the probe, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .probe import PROBE_BATCH, PROBE_TOKENS, Event, TopK
from .router import Router
from .self_check import fresh, refusal, same_ids, skips_one


def inside_of(event: Event, names: dict) -> list[TopK]:
    """The top-k calls of the block itself; attention may make some, too."""
    return [topk for topk in event.selections if (names[topk.module] + ".").startswith(event.block + ".")]


def selecting(event: Event, names: dict) -> TopK | None:
    """
    The top-k that decides which experts each token goes to, or `None` where no single one does: it selects groups of
    experts, a part of the K, or tokens for experts.

    Args:
        event ([`Event`]):
            A block that reached its experts.
        names (`dict`):
            Paths of modules.
    """
    inside = [topk for topk in inside_of(event, names) if topk.of_tokens]
    found = [topk for topk in inside if any(same_ids(ids, topk.ids) for ids in event.ids_args)]
    if found:
        return found[-1]
    given = [ids for ids in event.ids_args if _may_be_experts(ids, inside)]
    found = [topk for topk in inside if any(skips_one(ids, topk.ids) for ids in given)]
    return next(reversed(found if given else inside), None)


def _may_be_experts(ids: Tensor, inside: list[TopK]) -> bool:
    """Whether these are ids by token: no counts of tokens, and no mask over experts."""
    if ids.dtype == torch.bool or ids.ndim < 2 or ids.shape[-1] in {topk.columns for topk in inside}:
        return False
    return ids.numel() == PROBE_BATCH * PROBE_TOKENS * ids.shape[-1]


def check_order(router: Router, first_NK: Tensor, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """
    Refuse rows that are those of the first tokens of all sequences, then of the second ones, and so on: in a record
    one sequence follows the other.

    Args:
        router ([`Router`]):
            The router.
        first_NK (`torch.Tensor` of shape `(N, K)`):
            Ids that it selected in a forward that had another second sequence.
        forward (`Callable`):
            Its own forward, in a call of it.
        args, kwargs:
            Arguments of that call.

    Raises:
        [`UnsupportedRouterError`]: Naming the router.
    """
    _, second_NK = router.record(forward, fresh(args), kwargs)
    changed_N = (first_NK.sort(-1).values != second_NK.sort(-1).values).any(-1)
    if changed_N[:PROBE_TOKENS].any() and not changed_N[::PROBE_BATCH].any():
        raise refusal(
            router,
            "its rows go through the batch token by token, those of a record sequence by sequence. Flatten hidden "
            "states of shape (batch, tokens, hidden) in this order",
        )
