"""What goes into a replay and what comes out of a recording.

Legend: B batch, T tokens of a sequence, L MoE layers, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .record_checks import check_stale
from .routed_experts import RoutingShape, unpack


class RecordSource(Protocol):
    """Where a forward gets its record from."""

    def take(self, tokens: Tensor | None, batch_size: int, num_tokens: int) -> Tensor:
        """Packed ids of shape `(B, T, L, K)` for the forward of these tokens."""


@dataclass
class RecordedRoutes:
    """What [`RouterReplay.record`] yields: the selections of all forwards inside it."""

    shape: RoutingShape
    forwards: list[Tensor] = field(default_factory=list)  # packed (B, T_i, L, K)
    tokens: list[Tensor | None] = field(default_factory=list)  # (B, T_i), where the forward was given input ids

    @property
    def routed_experts(self) -> Tensor:
        """
        `torch.Tensor` of shape `(B, T, L, K)`, `torch.int16`: the forwards so far, concatenated along the sequence.
        """
        if not self.forwards:
            raise RuntimeError(
                "no forward ran inside `record()`, so there is nothing to read. Call the model inside it."
            )
        sizes = {forward.shape[0] for forward in self.forwards}
        if len(sizes) != 1:
            raise RuntimeError(
                f"the forwards inside `record()` had batch sizes {sorted(sizes)}, which cannot be concatenated along "
                "the sequence. Record batches of different sizes separately."
            )
        return unpack(torch.cat(self.forwards, dim=1), self.shape)


@dataclass
class ReplayStats:
    """What [`RouterReplay.replay`] yields: counts over its forwards, on the model's device until they are read."""

    forwards: int = 0
    recorded_tokens: Tensor | int = 0  # tokens with a record
    compared_tokens: Tensor | int = 0  # those that are attended to
    changed_routers: Tensor | int = 0  # (token, layer) pairs whose live set differs from the recorded one
    changed_tokens: Tensor | int = 0  # tokens with at least one such layer


@dataclass
class WholeBatch:
    """A record that every forward uses as a whole."""

    record: Tensor  # packed (B, T, L, K)
    shape: RoutingShape

    def take(self, tokens: Tensor | None, batch_size: int, num_tokens: int) -> Tensor:
        if tuple(self.record.shape[:2]) != (batch_size, num_tokens):
            raise ValueError(
                f"`routed_experts` is for a batch of {self.record.shape[0]} x {self.record.shape[1]} tokens, but the "
                f"forward has {batch_size} x {num_tokens}. Pass the record of these tokens, padded as they are."
            )
        if tokens is not None:
            for sample, (record, row) in enumerate(zip(self.record, tokens, strict=True)):
                check_stale(record, row, self.shape, sample=sample)
        return self.record
