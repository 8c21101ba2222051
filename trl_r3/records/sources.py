"""Where a forward gets its record from: what a source is, and the one of a batch that is replayed as a whole.

Legend: B batch, T tokens of a sequence, L MoE layers, S layer slots (L, or one per decoder layer), K experts per
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .checks import check_rows
from .real_tokens import RealTokens
from .record import RoutingLayout, missing_rows, pack, select_moe_layers


class RecordSource(Protocol):
    """Where a forward gets its record from."""

    observed: Tensor | None
    """Which of the `B * T` rows of the last forward to tell the live selection of."""

    def take(self, batch_size: int, num_tokens: int, tokens: Tensor | None = None) -> Tensor:
        """Packed ids of shape `(B, T, L, K)` for the next forward, of these input ids where it has any."""

    def take_packed(self, lengths: Sequence[int], tokens: Tensor | None = None) -> Tensor:
        """Packed ids of shape `(1, N, L, K)` for the next forward, whose row holds sequences of these lengths."""

    def observe(self, live_MLK: Tensor) -> None:
        """Take the live selection of the rows of `observed`."""

    def real(self, mask: Tensor) -> Tensor:
        """(B, T) of `bool`, on the host: which tokens the attention mask of a forward calls real."""


@dataclass
class WholeBatch:
    """A record that every forward uses as a whole."""

    record: Tensor  # packed (B, T, L, K)
    observed: Tensor | None = field(default=None, init=False)
    _real: RealTokens = field(default_factory=RealTokens, init=False)

    @classmethod
    def of(cls, routed_experts: Tensor, layout: RoutingLayout) -> WholeBatch:
        """
        Check a record of a whole batch.

        Args:
            routed_experts (`torch.Tensor` of shape `(B, T, S, K)`):
                Ids of any integer dtype, on any device. S is the number of MoE layers, or of decoder layers (slots of
                dense layers are ignored). A row of -1 is missing.
            layout ([`RoutingLayout`]):
                Layers and experts of the model.

        Raises:
            `ValueError`: Naming sample, layer and both numbers.
        """
        if not torch.is_tensor(routed_experts):
            routed_experts = torch.as_tensor(routed_experts, device="cpu")
        if routed_experts.ndim != 4:
            raise ValueError(
                f"`routed_experts` has {routed_experts.ndim} dimensions, shape {tuple(routed_experts.shape)}, "
                "expected 4: (batch, tokens, layers, top_k)."
            )
        record = pack(select_moe_layers(routed_experts, layout), layout)
        for sample, rows in enumerate(record.cpu()):
            check_rows(rows, layout, sample=sample)
            if rows.shape[0] > 1 and bool(missing_rows(rows, layout).all()):
                raise ValueError(
                    f"sample {sample}: all {rows.shape[0]} rows are missing, so nothing of it would be replayed. Pass "
                    "its record, or leave the sample out."
                )
        return cls(record)

    def observe(self, live_MLK: Tensor) -> None:
        """Nothing is asked for."""

    def real(self, mask: Tensor) -> Tensor:
        """Read once, however many forwards use the batch."""
        return self._real.of(mask)

    def take_packed(self, lengths: Sequence[int], tokens: Tensor | None = None) -> Tensor:
        """The record, likewise: it is laid out as the row is."""
        return self.take(1, sum(lengths), tokens)

    def take(self, batch_size: int, num_tokens: int, tokens: Tensor | None = None) -> Tensor:
        """The record, if it is of the forward's size."""
        if tuple(self.record.shape[:2]) != (batch_size, num_tokens):
            raise ValueError(
                f"`routed_experts` is for a batch of {self.record.shape[0]} x {self.record.shape[1]} tokens, but the "
                f"forward has {batch_size} x {num_tokens}. Pass the record of these tokens, padded as they are."
            )
        return self.record
