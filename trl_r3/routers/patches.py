"""Replace a method of one module, and give it back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


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
        return self.around(*self.context, self.original, args, kwargs)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return (getattr, (self.module, self.name)) if self.own is None else (_same, (self.own,))

    def remove(self) -> None:
        """Put back what was there. If somebody wrapped us meanwhile, we stay inside their wrapper and only pass on."""
        self.around, self.context = _pass_on, ()
        if self.module.__dict__.get(self.name) is self:
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
