"""Which of the top-k calls of a mixture block selects its experts, by what the experts were given.

Legend: N tokens of the probe, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .probe import PROBE_BATCH, PROBE_TOKENS, Event, TopK
from .self_check import same_ids, skips_one


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
    given = [ids for ids in event.ids_args if _may_be_experts(ids, inside)]
    found = [topk for topk in inside if any(same_ids(ids, topk.ids) for ids in given)]
    if given and not found:
        found = [topk for topk in inside if any(skips_one(ids, topk.ids) for ids in given)]
    return next(reversed(found if given else inside), None)


def _may_be_experts(ids: Tensor, inside: list[TopK]) -> bool:
    """Whether these are ids by token: no counts of tokens, and no mask over experts."""
    if ids.dtype == torch.bool or ids.ndim < 2 or ids.shape[-1] in {topk.columns for topk in inside}:
        return False
    return ids.numel() == PROBE_BATCH * PROBE_TOKENS * ids.shape[-1]
