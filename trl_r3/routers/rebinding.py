"""A router's own code with one name bound to another function: interception without a mode.

A `TorchFunctionMode` sees every torch function of a router, and each costs it some microseconds; only one of them
selects. Most routers call it as `torch.topk` in their forward itself, so it is enough if that name means another
function there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch


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
