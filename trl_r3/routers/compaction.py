"""Rows of padding go to no expert: they are taken out before the experts of a layer, and come back as zeros.

Legend: B batch, T tokens of a padded sequence, N real tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .discovery import is_experts
from .patches import ActivePass, Patch


@dataclass
class RealRows:
    """
    Which rows of a padded batch are real.

    Args:
        rows_N (`torch.Tensor` of shape `(N,)`):
            Their places among the `B * T` rows.
        count (`int`):
            `B * T`.
    """

    rows_N: Tensor
    count: int

    @classmethod
    def of(cls, mask: Any, main: Tensor) -> RealRows | None:
        """By the attention mask of a batch `(B, T, ...)`; `None` where it is none of `(B, T)`, or has no padding."""
        if not torch.is_tensor(mask) or mask.shape != main.shape[:2]:
            return None
        real = mask.detach().cpu().bool().flatten()
        if bool(real.all()) or not bool(real.any()):
            return None
        return cls(real.nonzero()[:, 0].to(mask.device), real.numel())


class CompactExperts:
    """
    Experts that see the real rows of a pass that has some, and all rows of any other.

    Args:
        stack (`torch.nn.Module`):
            The module above the decoder layers.
        active ([`ActivePass`]):
            The pass that a thread is in, of a forward or of a recompute.
    """

    def __init__(self, stack: nn.Module, active: ActivePass):
        self.active = active
        self.calls = 0  # over real rows
        modules = [module for name, module in stack.named_modules() if is_experts(name)]
        self._patches = [Patch(module, self._experts) for module in modules]

    def remove(self) -> None:
        """Give the experts back."""
        while self._patches:
            self._patches.pop().remove()

    def _experts(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        pass_ = self.active.current
        if pass_ is None or pass_.real is None:
            return forward(*args, **kwargs)
        self.calls += 1
        count = pass_.real.count
        device = next(value.device for value in (*args, *kwargs.values()) if torch.is_tensor(value))
        rows_N = pass_.real.rows_N.to(device)

        def real(value: Any) -> Any:
            return value[rows_N] if torch.is_tensor(value) and value.ndim and value.shape[0] == count else value

        output = forward(*map(real, args), **{name: real(value) for name, value in kwargs.items()})
        return output.new_zeros(count, *output.shape[1:]).index_copy(0, rows_N, output)
