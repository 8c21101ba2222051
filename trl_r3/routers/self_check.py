"""Check that a router can be replayed, on inputs that its model gave it.

Legend: N tokens of the probe, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ._compat_routers import forwards_alone
from .router import Router
from .top_k import ReboundForward, TopKCall, TopKWatch


class UnsupportedRouterError(ValueError):
    """A model, or a router in it, whose selection cannot be replayed. The message names it and says what was seen."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, where nothing compiled runs; each module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), forwards_alone(model):
            yield
    finally:
        for module in training:
            module.training = True


def rebound_forward(router: Router, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> ReboundForward | None:
    """
    The router's forward with another top-k, or `None` where a watched one sees more: scores before a mask.

    Args:
        router, forward, args, kwargs:
            As in [`check_router`].
    """
    seen: list[TopKCall] = []

    def on_topk(call: TopKCall, args: tuple, kwargs: dict) -> Any:
        seen.append(call)
        return torch.topk(*args, **kwargs)

    with TopKWatch(on_topk) as watch:
        forward(*fresh(args), **kwargs)
    rebound = None if watch.saw_masks else ReboundForward.of(forward)
    if rebound is None:
        return None
    by_watch, seen[:] = len(seen), []
    rebound(watch.topk, router.module, fresh(args), kwargs)
    return rebound if len(seen) == by_watch else None


def fresh(args: tuple) -> tuple:
    """Copies: some routers work in place."""
    return tuple(arg.clone() if torch.is_tensor(arg) else arg for arg in args)


def check_masks(router: Router, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """
    Refuse weights that are taken from scores of which groups were masked out in a way that nobody can undo: a recorded
    expert outside the live groups would get the weight 0, or no number at all, and its router no gradient.

    Args:
        router, forward, args, kwargs:
            As in [`check_router`].

    Raises:
        [`UnsupportedRouterError`]: Naming the router.
    """
    masked = False

    def run(factors: Tensor | None) -> Any:
        calls = 0

        def on_topk(call: TopKCall, args: tuple, kwargs: dict) -> Any:
            nonlocal calls, masked
            index, calls = calls, calls + 1
            top = torch.topk(*args, **kwargs)
            if index != router.call_index:
                return top
            masked = _are_masked(watch.unmasked(call.scores))
            return top if factors is None else torch.return_types.topk((top[0] * factors.to(top[0]), top[1]))

        with TopKWatch(on_topk) as watch:
            return forward(*fresh(args), **kwargs)

    output = run(None)
    # another factor for each slot, so that dividing by the sum does not hide it
    if masked and not _equal_outputs(output, run(torch.arange(2.0, router.top_k + 2, device="cpu"))):
        raise refusal(
            router,
            "it takes weights from scores in which it masked groups out by something other than `masked_fill`, so a "
            "recorded expert could get the weight 0. Mask with `scores.masked_fill(...)`, or gather the weights from "
            "the scores before the mask",
        )


def _are_masked(scores: Tensor) -> bool:
    """Whether all scores of some groups are exactly the lowest of their row, of other groups in other rows."""
    lowest = (scores == scores.amin(-1, keepdim=True)).flatten(0, -2)
    if bool((lowest == lowest[0]).all()):
        return False
    num_experts = lowest.shape[-1]
    sizes = [size for size in range(2, num_experts // 2 + 1) if num_experts % size == 0]
    groups = [lowest.unflatten(-1, (-1, size)) for size in sizes]
    return any(bool((group.all(-1) == group.any(-1)).all()) for group in groups)


def check_router(router: Router, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Router:
    """
    Check on real inputs that replaying its own selection leaves a router's output as it is, bit for bit, and that a
    foreign selection of every expert is executed as given.

    Args:
        router ([`Router`]):
            The router.
        forward (`Callable`):
            Its own forward, in a call of it: elsewhere its weights may be shards, or nothing.
        args, kwargs:
            Arguments of that call.

    Returns:
        [`Router`]: The router, whose `ids_output` is `None` if it names another expert in place of one that it skips.

    Raises:
        [`UnsupportedRouterError`]: Naming the router and what was seen.
    """
    untold = replace(router, ids_output=None)
    output, own_NK = untold.record(forward, fresh(args), kwargs)
    if router.ids_output is not None and skips_one(output[router.ids_output], own_NK):
        return check_router(untold, forward, args, kwargs)
    output, own_NK = router.record(forward, fresh(args), kwargs)
    replayed = router.replay(forward, fresh(args), kwargs, own_NK).output
    if router.ids_output is not None and not _equal_outputs(output, replayed):
        raise refusal(router, "its output changes when its own selection is replayed")
    for foreign_NK in _foreign_selections(own_NK, router.num_experts):
        output, live_NK, *_ = router.replay(forward, fresh(args), kwargs, foreign_NK)
        if live_NK is None or not torch.equal(live_NK, own_NK):
            raise refusal(router, "its live selection depends on the replayed one")
        if router.ids_output is not None and not same_ids(output[router.ids_output], foreign_NK):
            if skips_one(output[router.ids_output], foreign_NK):  # which the tokens of the probe had no use for
                return check_router(untold, forward, args, kwargs)
            executed_NK = output[router.ids_output].reshape(foreign_NK.shape)
            position = tuple((executed_NK != foreign_NK).nonzero()[0])
            raise refusal(
                router, f"it turned the replayed expert {int(foreign_NK[position])} into {int(executed_NK[position])}"
            )
        if router.ids_output is None and _equal_outputs(output, replayed):
            raise refusal(router, "its output does not depend on the replayed selection")
    return router


def _foreign_selections(own_NK: Tensor, num_experts: int) -> Iterator[Tensor]:
    """Rows of distinct ids that name every expert at least once."""
    tokens, top_k = own_NK.shape
    for start in range(0, num_experts, tokens * top_k):
        ids = torch.arange(start, start + tokens * top_k, device=own_NK.device).reshape(tokens, top_k) % num_experts
        yield ids.to(own_NK.dtype)


def _equal_outputs(one: Any, other: Any) -> bool:
    if torch.is_tensor(one):
        return torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return all(_equal_outputs(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def refusal(router: Router, seen: str) -> UnsupportedRouterError:
    """The error that names a router and says what was seen of it."""
    return UnsupportedRouterError(
        f"{router.name} ({type(router.module).__name__}, {router.top_k} of {router.num_experts} experts) cannot be "
        f"replayed: {seen}."
    )


def same_ids(ids: Any, selected: Tensor) -> bool:
    """Whether `ids` is a tensor of these selected ids, slot by slot, up to a flattened batch."""
    return (
        torch.is_tensor(ids)
        and not ids.is_floating_point()
        and ids.numel() == selected.numel()
        and ids.shape[-1:] == selected.shape[-1:]
        and bool((ids.reshape(selected.shape) == selected).all())
    )


def skips_one(ids: Any, selected: Tensor) -> bool:
    """Whether `ids` are these selected ids but for one, in whose place another is named: that one is no expert."""
    if not torch.is_tensor(ids) or ids.is_floating_point() or ids.numel() != selected.numel():
        return False
    ids = ids.reshape(selected.shape)
    other = ids != selected
    return selected[other].unique().numel() == 1 and ids[other].unique().numel() == 1
