"""Who else looks at what goes through the decoder: whoever counts the rows there expects those of the batch.

A hook on a module in the decoder, or on all that there are, is a watcher, and a forward of its own that experts or a
router were given, unless it is a library's and does not depend on the shape of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from .._compat import forward_hooks
from ._compat_routers import depends_on_shape
from .discovery import is_experts
from .patches import CurrentModules, Patch

_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "trl", "kernels", "liger_kernel", "trl_r3")


class Watchers:
    """
    Watchers of the decoder of a model, looked for once a pass.

    Args:
        model (`torch.nn.Module`):
            The model.
        current ([`CurrentModules`]):
            Of the module above its decoder layers.
        routers (sequence of `torch.nn.Module`):
            Its routers.
    """

    def __init__(self, model: nn.Module, current: CurrentModules, routers: Sequence[nn.Module]):
        self._current, self._routers = current, set(routers)
        self._prefix = next(
            f"{name}." if name else "" for name, module in model.named_modules() if module is current.stack
        )
        self._walked: list[nn.Module] | None = None
        self._hooks: list[dict[int, Callable]] = []
        self._names: list[str] = []
        self._holders: list[tuple[str, nn.Module]] = []  # of a forward that may be another one's
        self._of_libraries: set[int] = set()  # ids of hooks, which PyTorch never gives twice
        self._of_classes: set[Callable] = set()  # forwards that their classes were written with

    def find(self) -> str | None:
        """The first one and what it watches; `None` where there is nobody."""
        self._walk()
        for name, hooks in zip(self._names, self._hooks, strict=True) if any(self._hooks) else ():
            if hooks and not hooks.keys() <= self._of_libraries:
                for hook in hooks.values():
                    if (who := _stranger(hook)) is not None:
                        return f"a forward hook of {who} watches {name}"
                self._of_libraries.update(hooks)
        for name, module in self._holders:
            own, given = type(module).forward, vars(module).get("forward")
            if own in self._of_classes and given is None:  # nearly always
                continue
            if (who := _stranger_in_place(given, module)) is not None:
                return f"a forward of {who} is in place of that of {name}"
            self._of_classes.add(own)
        return None

    def _walk(self) -> None:
        modules = self._current.get()
        if modules is self._walked:
            return
        self._walked, self._names, self._holders = modules, ["all modules"] * 2, []
        self._hooks = [*forward_hooks(None)]
        for below, module in self._current.stack.named_modules():
            if not below:  # what goes in there and comes out is of the batch
                continue
            name = f"{self._prefix}{below}"
            for hooks in forward_hooks(module):
                self._names.append(name)
                self._hooks.append(hooks)
            if module in self._routers or is_experts(name):
                self._holders.append((name, module))


def _stranger_in_place(forward: Any, module: nn.Module) -> str | None:
    """Who gave a module (`forward`), or its class, another one than the class was written with."""
    while isinstance(forward, Patch):
        forward = forward.own
    if forward is not None and (who := _stranger(forward, type(module).forward)) is not None:
        return who
    owner = next(each for each in type(module).__mro__ if "forward" in vars(each))
    own = vars(owner)["forward"]
    return None if _where(own) == owner.__module__ else _stranger(own)


def _where(function: Any) -> str:
    """Name of the module that a function, or the class of a callable, was written in."""
    return getattr(function, "__globals__", {}).get("__name__") or type(function).__module__


def _stranger(function: Any, own: Callable | None = None) -> str | None:
    """Where a function was written, in this order: itself, what it wraps; `None` if all of it is of libraries."""
    while function is not None:
        while isinstance(function, partial):
            function = function.func
        function = getattr(function, "__func__", function)
        if function is own:
            return None
        where = _where(function)
        if where.partition(".")[0] not in _LIBRARIES or depends_on_shape(function):
            code = getattr(function, "__code__", None)  # which `functools.wraps` leaves alone
            return f"{where}.{type(function).__qualname__ if code is None else code.co_name}"
        function = getattr(function, "__wrapped__", None)
    return None
