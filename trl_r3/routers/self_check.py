"""Check that a router can be replayed, on inputs that its model gave it.

Legend: N tokens of the probe, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
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
        forward(*_fresh(args), **kwargs)
    rebound = None if watch.saw_masks else ReboundForward.of(forward)
    if rebound is None:
        return None
    by_watch, seen[:] = len(seen), []
    rebound(watch.topk, router.module, _fresh(args), kwargs)
    return rebound if len(seen) == by_watch else None


def _fresh(args: tuple) -> tuple:
    # some routers work in place
    return tuple(arg.clone() if torch.is_tensor(arg) else arg for arg in args)


def check_router(router: Router, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
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

    Raises:
        [`UnsupportedRouterError`]: Naming the router and what was seen.
    """
    output, own_NK = router.record(forward, _fresh(args), kwargs)
    replayed = router.replay(forward, _fresh(args), kwargs, own_NK).output
    if router.ids_output is not None and not _equal_outputs(output, replayed):
        raise refusal(router, "its output changes when its own selection is replayed")
    for foreign_NK in _foreign_selections(own_NK, router.num_experts):
        output, live_NK, *_ = router.replay(forward, _fresh(args), kwargs, foreign_NK)
        if live_NK is None or not torch.equal(live_NK, own_NK):
            raise refusal(router, "its live selection depends on the replayed one")
        if router.ids_output is not None and not same_ids(output[router.ids_output], foreign_NK):
            executed_NK = output[router.ids_output].reshape(foreign_NK.shape)
            position = tuple((executed_NK != foreign_NK).nonzero()[0])
            raise refusal(
                router, f"it turned the replayed expert {int(foreign_NK[position])} into {int(executed_NK[position])}"
            )
        if router.ids_output is None and _equal_outputs(output, replayed):
            raise refusal(router, "its output does not depend on the replayed selection")


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
