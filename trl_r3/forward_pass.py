"""One forward of a model whose routers are watched, and the means to watch it.

Legend: N tokens of a forward (B * T), L MoE layers, K experts per token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._compat import checkpoint_function_name
from .routed_experts import RoutingShape
from .selection import Router


class ForwardPass:
    """One forward through the decoder stack, and the recomputes of its layers in backward."""

    def __init__(self, routers: list[Router], shape: RoutingShape, replayed_NLK: Tensor | None, recording: bool):
        self.routers = routers
        self.shape = shape
        self.replayed_NLK = replayed_NLK
        self.recording = recording
        self.attended_N: Tensor | None = None  # real tokens, where that is known
        self.selected: dict[int, Tensor] = {}  # by MoE layer: (N, K) of the record
        self.changed_N: Tensor | None = None
        self.changed_routers: Tensor | int = 0
        self.fired = [0] * len(routers)
        self.closed = False

    def route(self, index: int, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run router `index` as this pass wants it."""
        router = self.routers[index]
        if not self.closed:
            self.fired[index] += 1
        if self.recording:
            return self._record(index, forward, args, kwargs)
        if self.replayed_NLK is None:
            return forward(*args, **kwargs)
        device = next(value.device for value in (*args, *kwargs.values()) if torch.is_tensor(value))
        replayed_NK = self.replayed_NLK[:, index].to(device)  # layers may be spread over devices
        output, live_NK = router.run(forward, args, kwargs, replayed_NK, self.shape.missing)
        if not self.closed:
            self._compare(live_NK, replayed_NK)
        return output

    def _record(self, index: int, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        # a recompute goes through the experts that its forward has gone through
        recorded_NK = self.selected.get(index)
        output, live_NK = self.routers[index].intercept(forward, args, kwargs, recorded_NK, missing=-1)
        if recorded_NK is None:
            self.selected[index] = live_NK
        return output

    def _compare(self, live_NK: Tensor, replayed_NK: Tensor) -> None:
        same_NK = (live_NK[:, :, None] == replayed_NK[:, None, :]).any(-1)
        changed_N = ~same_NK.all(-1) & (replayed_NK[:, 0] != self.shape.missing)
        changed_N = changed_N.to(self.replayed_NLK.device)  # type: ignore[union-attr]
        if self.attended_N is not None:
            changed_N &= self.attended_N.to(changed_N.device)
        self.changed_routers = self.changed_routers + changed_N.sum()
        self.changed_N = changed_N if self.changed_N is None else self.changed_N | changed_N

    def close(self) -> None:
        """Check that the forward went through every router once, where that matters."""
        self.closed = True
        if not self.recording and self.replayed_NLK is None:
            return
        for router, fired in zip(self.routers, self.fired, strict=True):
            if fired != 1:
                raise RuntimeError(
                    f"{router.name} ({type(router.module).__name__}) ran {fired} times in a forward, expected 1: its "
                    f"selection was {'not' if fired == 0 else 'more than once'} replayed. A fused block, a swapped "
                    "kernel or a replaced module bypasses it; undo that, or attach after it."
                )


class ActivePass(threading.local):
    """The pass that this thread is in. Backward recomputes on threads of its own."""

    current: ForwardPass | None = None
    removed: threading.Event  # shared by all threads

    def __init__(self, removed: threading.Event):
        self.removed = removed  # threading.local passes this on to every thread

    def __reduce__(self):  # a copied model starts idle
        return (_idle, ())

    @contextmanager
    def use(self, pass_: ForwardPass | None) -> Iterator[None]:
        """Enter a pass."""
        previous, self.current = self.current, pass_
        try:
            yield
        finally:
            self.current = previous

    def bind(self, function: Callable, pass_: ForwardPass) -> Callable:
        """Let a checkpointed function run in `pass_`, now and when it is recomputed."""

        def run_in_pass(*args, **kwargs):
            if self.removed.is_set() and pass_.replayed_NLK is not None:
                raise RuntimeError(
                    "routing replay was removed between a replayed forward and its backward, so the recompute would "
                    "route live. Call `backward()` before `remove()` or `disable_routing_replay()`."
                )
            with self.use(pass_):
                return function(*args, **kwargs)

        return run_in_pass


def _idle() -> ActivePass:
    return ActivePass(threading.Event())


class Patch:
    """Replaces the forward of one module until it is removed. A class, so that a copied model gets a copied patch."""

    def __init__(self, module: nn.Module, around: Callable, *context: Any):
        self.module = module
        self.own = module.__dict__.get("forward")
        self.around = around
        self.context = context
        module.forward = self.run  # type: ignore[method-assign]

    def original(self, *args, **kwargs):
        """The forward that was there before."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def run(self, *args, **kwargs):
        """The forward that is there now."""
        return self.around(*self.context, self.original, args, kwargs)

    def remove(self) -> None:
        """Put back what was there. If somebody wrapped us meanwhile, we stay inside their wrapper and only pass on."""
        self.around, self.context = _pass_on, ()
        if self.module.__dict__.get("forward") == self.run:
            if self.own is not None:
                self.module.forward = self.own  # type: ignore[method-assign]
            else:
                del self.module.forward


def _pass_on(forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)


@contextmanager
def bound_checkpoints(stack: nn.Module, active: ActivePass, pass_: ForwardPass) -> Iterator[None]:
    """
    Tie a pass to what the layers checkpoint in it.

    Backward may run long after the forward, after other forwards, or never. The recompute finds its record because it
    is part of the function that the checkpoint keeps, not because some state still happens to be there.
    """
    modules = stack.modules() if torch.is_grad_enabled() else ()
    found = [(module, checkpoint_function_name(module)) for module in modules]
    bound = [(module, name, module.__dict__[name]) for module, name in found if name is not None]
    for module, name, checkpoint in bound:
        setattr(module, name, _binding(checkpoint, active, pass_))
    try:
        yield
    finally:
        for module, name, checkpoint in bound:
            setattr(module, name, checkpoint)


def _binding(checkpoint: Callable, active: ActivePass, pass_: ForwardPass) -> Callable:
    return lambda function, *args, **kwargs: checkpoint(active.bind(function, pass_), *args, **kwargs)
