"""Two ways to see the top-k calls of a router's forward: a mode over it, or its code with `torch.topk` bound anew.

A `TorchFunctionMode` sees every torch function of a router, and each costs it some microseconds; only one of them
selects. Most routers call it as `torch.topk` in their forward itself, so it is enough if that name means another
function there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TOPK = (torch.topk, torch.Tensor.topk)
_MASKED_FILL = (torch.masked_fill, torch.Tensor.masked_fill)


class TopKCall(NamedTuple):
    """Arguments of a `torch.topk` call: over which columns, and how many of them."""

    scores: Tensor
    top_k: int
    dim: int = -1

    @classmethod
    def parse(cls, args: tuple, kwargs: dict[str, Any]) -> TopKCall:
        """Read them however they were passed."""
        if len(args) == 2 and kwargs.keys() <= {"dim", "sorted"}:  # as most routers do
            return cls(args[0], int(args[1]), kwargs.get("dim", -1))
        names = ("input", "k", "dim")
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        return cls(bound["input"], int(bound["k"]), int(bound.get("dim", -1)))

    @property
    def columns(self) -> int:
        """Size of the dimension that is selected from."""
        return self.scores.shape[self.dim]


class TopKWatch(TorchFunctionMode):
    """
    Calls `on_topk(call, args, kwargs)` in place of each `torch.topk` under it, and returns what that returns.

    Args:
        on_topk (`Callable`):
            Receives the [`TopKCall`], and the arguments of `torch.topk`.
    """

    def __init__(self, on_topk: Callable[[TopKCall, tuple, dict], Any]):
        super().__init__()
        self.on_topk = on_topk
        self._before_mask: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _TOPK:
            return self.topk(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _MASKED_FILL:
            self._before_mask.append((result, args[0]))
        return result

    def topk(self, *args, **kwargs):
        """What a router calls in place of `torch.topk`."""
        return self.on_topk(TopKCall.parse(args, kwargs), args, kwargs)

    @property
    def saw_masks(self) -> bool:
        """Whether anything was masked out."""
        return bool(self._before_mask)

    def unmasked(self, scores: Tensor) -> Tensor:
        """
        The scores before groups or capacity were masked out.

        Masks only select. A gate that takes its weights from masked scores (group-limited DeepSeek-V2) would give an
        expert outside the live groups the weight 0, and its router no gradient.
        """
        for masked, source in reversed(self._before_mask):
            if masked is scores:
                return source
        return scores


class ReboundForward:
    """
    The code of a module's forward, in which `torch.topk` can be given another meaning for a call.

    Args:
        forward (`types.FunctionType`):
            The forward, as its class has it.
        name (`str`):
            What it calls `torch`.
    """

    def __init__(self, forward: FunctionType, name: str):
        self.forward = forward
        self._meaning = threading.local()  # layers on several devices recompute on several threads
        torch_here = ModuleType("torch")
        torch_here.__dict__.update(torch.__dict__)
        torch_here.topk = self._topk  # type: ignore[attr-defined]
        self._code = FunctionType(
            forward.__code__,
            {**forward.__globals__, name: torch_here},
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        self._code.__kwdefaults__ = forward.__kwdefaults__

    @classmethod
    def of(cls, forward: Callable) -> ReboundForward | None:
        """That of a bound forward, or `None` where it does not call `torch.topk` by that name itself."""
        if not isinstance(forward, MethodType) or not isinstance(forward.__func__, FunctionType):
            return None
        function = forward.__func__
        used = function.__code__.co_names
        name = next((name for name in used if function.__globals__.get(name) is torch), None)
        return None if name is None or "topk" not in used else cls(function, name)

    def runs(self, forward: Callable) -> bool:
        """Whether this is the code of `forward`: nobody has wrapped it since."""
        return getattr(forward, "__func__", None) is self.forward

    def __call__(self, topk: Callable, module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the forward of `module`, with `topk` in place of `torch.topk`."""
        self._meaning.topk = topk
        try:
            return self._code(module, *args, **kwargs)
        finally:
            self._meaning.topk = None

    def _topk(self, *args: Any, **kwargs: Any) -> Any:
        return self._meaning.topk(*args, **kwargs)
