"""What is put into a model while a handle is on it: methods that are replaced, checkpoints that are tied to a pass.

Legend: B batch, T tokens of a sequence, N tokens of a forward (B * T), L MoE layers, K experts per token.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, is_grad_enabled, nn

from .._compat import checkpoint_functions, in_backward
from ..records.sources import RecordSource
from ..records.unpadded_rows import sequence_lengths, unpadded_positions


class Patch:
    """
    Takes the place of a method of one module until it is removed. A copy of the module gets its own method back.

    Args:
        module (`torch.nn.Module`):
            The module.
        around (`Callable`):
            Called as `around(*context, original, args, kwargs)` in place of the method.
        context:
            What it is given first.
        name (`str`, *optional*, defaults to `"forward"`):
            Of the method.
        parameter (`str`, *optional*):
            A keyword that the method takes from now on. `inspect.signature` shows it: `Trainer` drops columns and
            `generate` refuses arguments by the signature of `forward`.
    """

    def __init__(
        self, module: nn.Module, around: Callable, *context: Any, name: str = "forward", parameter: str | None = None
    ):
        self.module = module
        self.around = around
        self.context = context
        self.name = name
        self.own = module.__dict__.get(name)
        self.original = getattr(module, name)
        self.__signature__ = _signature(self.original, parameter)
        setattr(module, name, self)

    def __call__(self, *args, **kwargs):
        if args and args[0] is self.module:  # `unwrap_model(keep_fp32_wrapper=False)` makes it a method of the module
            args = args[1:]
        return self.around(*self.context, self.original, args, kwargs)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return (getattr, (self.module, self.name)) if self.own is None else (_same, (self.own,))

    @property
    def removed(self) -> bool:
        """Whether it only passes on, wherever it was left."""
        return self.around is _pass_on

    def remove(self) -> None:
        """Put back what was there. If somebody wrapped us meanwhile, we stay inside their wrapper and only pass on."""
        self.around, self.context = _pass_on, ()
        there = self.module.__dict__.get(self.name)
        if getattr(there, "__func__", there) is self:
            if self.own is not None:
                setattr(self.module, self.name, self.own)
            else:
                delattr(self.module, self.name)


def _signature(method: Callable, parameter: str | None) -> inspect.Signature:
    signature = inspect.signature(method)
    if parameter is None:
        return signature
    added = inspect.Parameter(parameter, inspect.Parameter.KEYWORD_ONLY, default=None)
    own = list(signature.parameters.values())
    rest = own[-1:] if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    return signature.replace(parameters=[*own[: len(own) - len(rest)], added, *rest])


def _same(method: Callable) -> Callable:
    return method


def _pass_on(original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    return original(*args, **kwargs)


class Pass(Protocol):
    """One forward through the decoder stack, and the recomputes of its layers in backward."""

    replays: bool
    """Whether it goes through recorded experts."""
    lengths: list[int] | None
    """Of its sequences, where it is packed."""
    attended: int
    """Calls of attention so far."""
    real: Any
    """The [`RealRows`] that experts see, where it is padded and they do not see all."""

    def route(self, index: int, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run router `index` as this pass wants it."""


@dataclass
class _Shared:
    """What all threads know of a handle."""

    removed: threading.Event = field(default_factory=threading.Event)
    thread: int | None = None  # whose forwards are recorded or replayed


class ActivePass(threading.local):
    """The pass that this thread is in. Backward recomputes on threads of its own."""

    current: Pass | None = None

    def __init__(self, shared: _Shared):
        self.shared = shared  # threading.local passes this on to every thread

    @classmethod
    def idle(cls) -> ActivePass:
        """In no pass."""
        return cls(_Shared())

    @property
    def removed(self) -> threading.Event:
        """Set once the handle is removed."""
        return self.shared.removed

    def begin(self) -> None:
        """A context that records or replays begins."""
        self.shared.thread = None

    def meet(self) -> None:
        """
        Take the thread of a forward inside a context, the first that comes, or refuse another: what threads feed at
        the same time is of other tokens.
        """
        if in_backward():
            return
        own, known = threading.get_ident(), self.shared.thread
        if known not in (None, own):
            raise RuntimeError(
                f"a forward of thread {own} inside a `record()` or `replay()` that has one of thread {known}: it "
                "would go through experts of other tokens, or be recorded among them. Let threads wait for each other "
                "(a lock), or give each a model of its own."
            )
        self.shared.thread = own

    def __reduce__(self):  # a copied model starts idle
        return (ActivePass.idle, ())

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
            if self.removed.is_set() and pass_.replays:
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


def attended_tokens(mask: Any, batch_size: int, num_tokens: int) -> Tensor | None:
    """(N,) of `bool`, where the mask says which tokens are real."""
    if torch.is_tensor(mask) and mask.shape == (batch_size, num_tokens):
        return mask.flatten().bool()
    return None


def take_rows(
    source: RecordSource, kwargs: dict[str, Any], batch_size: int, num_tokens: int, tokens: Tensor | None
) -> Tensor:
    """Packed ids of shape `(B, T, L, K)` for a forward with these arguments, padded or packed."""
    positions = unpadded_positions(kwargs, num_tokens) if batch_size == 1 else None
    lengths = None if positions is None else sequence_lengths(positions, batch_size, num_tokens)
    if lengths is None:
        return source.take(batch_size, num_tokens, tokens)
    return source.take_packed(lengths, tokens)


def get_batch(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
    """Input ids (B, T), if the forward has them, and what it starts from: these, or embeddings (B, T, ...)."""
    embeds: Any = kwargs.get("inputs_embeds")
    ids: Any = kwargs.get("input_ids", args[0] if args else None)
    main = ids if torch.is_tensor(ids) and embeds is None else embeds
    if not torch.is_tensor(main) or main.ndim < 2:
        raise RuntimeError(
            f"the decoder was called with {sorted(kwargs)} and {len(args)} positional arguments, but neither "
            "`input_ids` nor `inputs_embeds` is a batch among them. Pass one of them by name."
        )
    return (ids if torch.is_tensor(ids) and ids.ndim == 2 else None), main
