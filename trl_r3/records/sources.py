"""Where forwards get their rows from, and where they leave them.

Legend: B batch, T tokens of a sequence, L MoE layers, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .layout import RoutingLayout
from .storage import unpack


class RecordSource(Protocol):
    """Where a forward gets its record from."""

    observed: Tensor | None
    """Which of the `B * T` rows of the last forward to tell the live selection of."""

    def take(self, batch_size: int, num_tokens: int, tokens: Tensor | None = None) -> Tensor:
        """Packed ids of shape `(B, T, L, K)` for the next forward, of these input ids where it has any."""

    def observe(self, live_MLK: Tensor) -> None:
        """Take the live selection of the rows of `observed`."""


@dataclass
class WholeBatch:
    """A record that every forward uses as a whole."""

    record: Tensor  # packed (B, T, L, K)
    observed: Tensor | None = field(default=None, init=False)

    def observe(self, live_MLK: Tensor) -> None:
        """Nothing is asked for."""

    def take(self, batch_size: int, num_tokens: int, tokens: Tensor | None = None) -> Tensor:
        """The record, if it is of the forward's size."""
        if tuple(self.record.shape[:2]) != (batch_size, num_tokens):
            raise ValueError(
                f"`routed_experts` is for a batch of {self.record.shape[0]} x {self.record.shape[1]} tokens, but the "
                f"forward has {batch_size} x {num_tokens}. Pass the record of these tokens, padded as they are."
            )
        return self.record


@dataclass
class RecordedRoutes:
    """What [`RouterReplay.record`] yields: the selections of all forwards inside it."""

    layout: RoutingLayout
    forwards: list[Tensor] = field(default_factory=list)  # packed (B, T_i, L, K)
    tokens: list[Tensor | None] = field(default_factory=list)  # (B, T_i), where the forward was given input ids

    @property
    def packed(self) -> Tensor:
        """(B, T, L, K) packed: the forwards so far, concatenated along the sequence."""
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
        return torch.cat(self.forwards, dim=1)

    @property
    def routed_experts(self) -> Tensor:
        """
        `torch.Tensor` of shape `(B, T, L, K)`, `torch.int16`: the forwards so far, concatenated along the sequence.
        """
        return unpack(self.packed, self.layout)
