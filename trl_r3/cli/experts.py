"""Which experts ran, seen at the experts themselves, whatever replay believes: the watch of commands and tests.

Legend: N tokens of a call, K experts per token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


def experts_of(model: nn.Module) -> dict[int, nn.Module]:
    """The outermost modules named `experts`, by the decoder layer in their path."""
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        index = re.search(r"\.(\d+)\.", name)
        if name.rpartition(".")[2] == "experts" and index is not None:
            found.setdefault(int(index[1]), module)
    return found


def ids_among(args: tuple, kwargs: dict) -> Tensor | None:
    """The one integer tensor among the arguments of experts, if there is one."""
    ids = [a for a in (*args, *kwargs.values()) if torch.is_tensor(a) and not a.is_floating_point()]
    return ids[0] if len(ids) == 1 else None


@contextmanager
def watched_experts(model: nn.Module, note: Callable[[int, Tensor], None]) -> Iterator[None]:
    """
    Call `note(layer, ids_NK)` whenever the experts of a decoder layer are entered with ids, recomputes included.

    Args:
        model (`torch.nn.Module`):
            A mixture of experts, in whatever wrapper.
        note (`Callable`):
            Gets the decoder layer and a copy of the `(N, K)` ids, before the experts run.
    """

    def enter(layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = ids_among(args, kwargs)
        if ids is not None:
            note(layer, ids.detach().clone())

    handles = [
        module.register_forward_pre_hook(partial(enter, layer), with_kwargs=True, prepend=True)
        for layer, module in experts_of(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def executed_ids(model: nn.Module) -> Iterator[dict[int, list[Tensor]]]:
    """Collect what [`watched_experts`] sees inside: by decoder layer, one tensor `(N, K)` a call."""
    seen: dict[int, list[Tensor]] = {}
    with watched_experts(model, lambda layer, ids_NK: seen.setdefault(layer, []).append(ids_NK)):
        yield seen
