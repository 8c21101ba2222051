"""Which pass a thread is in, also when a checkpoint recomputes a layer of it in backward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import is_grad_enabled, nn

from .._compat import checkpoint_functions
from .forward_pass import Pass, ReplayingPass


class ActivePass(threading.local):
    """The pass that this thread is in. Backward recomputes on threads of its own."""

    current: Pass | None = None
    removed: threading.Event  # shared by all threads

    def __init__(self, removed: threading.Event):
        self.removed = removed  # threading.local passes this on to every thread

    def __reduce__(self):  # a copied model starts idle
        return (_idle, ())

    @contextmanager
    def use(self, pass_: Pass | None) -> Iterator[None]:
        """Enter a pass."""
        previous, self.current = self.current, pass_
        try:
            yield
        finally:
            self.current = previous

    def bind(self, function: Callable, pass_: Pass) -> Callable:
        """Let a checkpointed function run in `pass_`, now and when it is recomputed."""

        def run_in_pass(*args, **kwargs):
            if self.removed.is_set() and isinstance(pass_, ReplayingPass):
                raise RuntimeError(
                    "routing replay was removed between a replayed forward and its backward, so the recompute would "
                    "route live. Call `backward()` before `remove()` or `disable_routing_replay()`."
                )
            with self.use(pass_):
                return function(*args, **kwargs)

        return run_in_pass


class CurrentModules:
    """
    All modules of a decoder stack, walked through again where its layers are others: FSDP's activation checkpointing
    wraps them inside `train()`. Walking through all at each forward would take longer than replay.

    Args:
        stack (`torch.nn.Module`):
            The module above the decoder layers.
    """

    def __init__(self, stack: nn.Module):
        self.stack = stack
        self._layers: list[nn.Module] = []
        self._all: list[nn.Module] = []

    def get(self) -> list[nn.Module]:
        """The modules that are there now."""
        layers = [layer for part in self.stack.children() for layer in part.children()]
        if layers != self._layers:
            self._layers, self._all = layers, list(self.stack.modules())
        return self._all


def _idle() -> ActivePass:
    return ActivePass(threading.Event())


@contextmanager
def bound_checkpoints(modules: Sequence[nn.Module], active: ActivePass, pass_: Pass) -> Iterator[None]:
    """
    Tie a pass to what the layers checkpoint in it.

    Backward may run long after the forward, after other forwards, or never. The recompute finds its record because it
    is part of the function that the checkpoint keeps, not because some state still happens to be there.
    """
    bound = checkpoint_functions(modules) if is_grad_enabled() else []
    for module, name, checkpoint in bound:
        setattr(module, name, _binding(checkpoint, active, pass_))
    try:
        yield
    finally:
        for module, name, checkpoint in bound:
            setattr(module, name, checkpoint)


def _binding(checkpoint: Callable, active: ActivePass, pass_: Pass) -> Callable:
    return lambda function, *args, **kwargs: checkpoint(active.bind(function, pass_), *args, **kwargs)
