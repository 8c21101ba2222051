"""Rows of padding go to no expert: they are taken out before the experts of a layer, and come back as zeros.

Legend: B batch, T tokens of a padded sequence, N real tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .discovery import is_experts
from .patches import ActivePass, Patch


class RealRows:
    """
    Which rows of a padded batch are real, on the host, and wherever a layer asks for them.

    Args:
        real_BT (`torch.BoolTensor` of shape `(B, T)`):
            Which tokens are, on the host.
    """

    def __init__(self, real_BT: Tensor):
        self.size = batch_size, width = (real_BT.shape[0], real_BT.shape[1])
        self.count = batch_size * width
        self.rows_N = real_BT.flatten().nonzero()[:, 0]
        self._there: dict[torch.device, Tensor] = {self.rows_N.device: self.rows_N}

    @classmethod
    def of(cls, real_BT: Tensor) -> RealRows | None:
        """Those of a batch; `None` where it has no padding, or nothing else."""
        rows = cls(real_BT)
        return rows if 0 < len(rows.rows_N) < rows.count else None

    def on(self, device: torch.device) -> Tensor:
        """(N,) their places among the `B * T` rows, on a device."""
        if device not in self._there:  # what is sent needs no wait
            self._there[device] = self.rows_N.to(device, non_blocking=True)
        return self._there[device]

    def real(self, values: Tensor) -> Tensor:
        """(N, ...) of the `(B * T, ...)` rows of the padded batch, wherever these are."""
        return values[self.on(values.device)]

    def padded(self, values: Tensor) -> Tensor:
        """(B * T, ...) of `(N, ...)`: zeros where padding is."""
        zeros = values.new_zeros(self.count, *values.shape[1:])
        return zeros.index_copy(0, self.on(values.device), values)

    def only(self, values: Tensor, fill: int) -> Tensor:
        """The `(B * T, ...)` rows of a padded batch, with `fill` where padding is."""
        return torch.full_like(values, fill).index_copy(0, self.on(values.device), self.real(values))


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
        rows = None if pass_ is None else pass_.real
        if rows is None:
            return forward(*args, **kwargs)
        self.calls += 1

        def real(value: Any) -> Any:
            if not torch.is_tensor(value) or not value.ndim:
                return value
            if value.ndim > 2 and tuple(value.shape[:2]) == rows.size:
                return rows.real(value.flatten(0, 1))[None]
            return rows.real(value) if len(value) == rows.count else value

        output = forward(*map(real, args), **{name: real(value) for name, value in kwargs.items()})
        if output.ndim > 2:
            return rows.padded(output.flatten(0, 1)).unflatten(0, rows.size)
        return rows.padded(output)
