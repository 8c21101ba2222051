"""How a selection spreads over the experts, layer by layer.

Legend: L MoE layers, E experts, K experts per token, M rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .metrics import expert_load
from .record import MISSING


@dataclass(frozen=True)
class ExpertLoad:
    """
    How often each expert of each layer was selected.

    Args:
        counts_LE (`torch.Tensor` of shape `(L, E)`, `torch.int64`):
            The counts.

    Example:

    ```python
    >>> with replay.record() as recorded, torch.no_grad():
    ...     model(input_ids)
    >>> ExpertLoad.of(recorded.routed_experts, replay.num_experts).max_over_mean
    ```
    """

    counts_LE: Tensor

    @classmethod
    def of(cls, routed_experts: Tensor, num_experts: int) -> ExpertLoad:
        """
        Count a selection.

        Args:
            routed_experts (`torch.Tensor` of shape `(..., L, K)`):
                Ids of any integer dtype, on any device; rows of -1 do not count.
            num_experts (`int`):
                Number of experts E.

        Raises:
            `ValueError`: If an id is no expert of the model: it would count for another layer.
        """
        ids = torch.as_tensor(routed_experts, device="cpu")
        ids_MLK = ids.reshape(-1, *ids.shape[-2:])
        ids_MLK = ids_MLK[ids_MLK[:, 0, 0] != MISSING]
        low, high = map(int, torch.aminmax(ids_MLK.long())) if ids_MLK.numel() else (0, 0)
        if low < 0 or high >= num_experts:
            raise ValueError(
                f"expert id {low if low < 0 else high} is outside [0, {num_experts}). Pass the record of a model with "
                "so many experts; a missing row is -1."
            )
        if ids_MLK.device.type == "cpu":
            return cls(expert_load(ids_MLK, num_experts))
        layers = ids_MLK.shape[1]
        first_L1 = num_experts * torch.arange(layers, device=ids_MLK.device)[:, None]
        counts = torch.bincount((ids_MLK + first_L1).flatten(), minlength=layers * num_experts)
        return cls(counts.view(layers, num_experts))

    @property
    def max_over_mean(self) -> Tensor:
        """(L,) load of the busiest expert over the mean of its layer: 1 where all are equal. NaN where none ran."""
        return self.counts_LE.amax(1) / self.counts_LE.double().mean(1)

    @property
    def dead_experts(self) -> Tensor:
        """(L,) number of experts that no token went to."""
        return (self.counts_LE == 0).sum(1)

    @property
    def entropy(self) -> Tensor:
        """(L,) entropy of the load over that of an even one: 1 where all are equal, 0 where one expert takes all."""
        share = self.counts_LE / self.counts_LE.double().sum(1, keepdim=True)
        return -torch.special.xlogy(share, share).sum(1) / math.log(self.counts_LE.shape[1])
