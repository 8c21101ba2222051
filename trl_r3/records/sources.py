"""Where forwards get their rows from, and where they leave them.

Legend: B batch, T tokens of a sequence, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .layout import RoutingLayout
from .storage import align, missing_rows, unpack


class RecordSource(Protocol):
    """Where a forward gets its record from."""

    def take(self, batch_size: int, num_tokens: int) -> Tensor:
        """Packed ids of shape `(B, T, L, K)` for the next forward."""


@dataclass
class WholeBatch:
    """A record that every forward uses as a whole."""

    record: Tensor  # packed (B, T, L, K)

    def take(self, batch_size: int, num_tokens: int) -> Tensor:
        """The record, if it is of the forward's size."""
        if tuple(self.record.shape[:2]) != (batch_size, num_tokens):
            raise ValueError(
                f"`routed_experts` is for a batch of {self.record.shape[0]} x {self.record.shape[1]} tokens, but the "
                f"forward has {batch_size} x {num_tokens}. Pass the record of these tokens, padded as they are."
            )
        return self.record


@dataclass
class ScoredBatch:
    """
    The records of a batch that one or several forwards score, a slice of its samples each.

    Args:
        prompt_lengths (sequence of `int`):
            P_i of each sample.
        records (sequence of `torch.Tensor` of shape `(T_i - 1, L, K)`):
            Packed ids.
        prompt_width (`int`):
            Width of the padded prompts.
        layout ([`RoutingLayout`]):
            Layers and experts of the model.
        rows_that_matter (sequence of `int`, *optional*):
            How many rows of each sample, from its first on, the loss depends on. All by default.
    """

    prompt_lengths: Sequence[int]
    records: Sequence[Tensor]
    prompt_width: int
    layout: RoutingLayout
    rows_that_matter: Sequence[int] | None = None
    scored: int = field(default=0, init=False)
    rows: int = field(default=0, init=False)  # handed out, of those that matter
    missing: int = field(default=0, init=False)  # of these, without a record

    def take(self, batch_size: int, num_tokens: int) -> Tensor:
        """Packed ids of shape `(B, T, L, K)` of the next `batch_size` samples: only these go to the device."""
        chosen = slice(self.scored, self.scored + batch_size)
        if chosen.stop > len(self.records):
            raise RuntimeError(
                f"a forward scores samples {chosen.start} to {chosen.stop - 1}, but the batch has "
                f"{len(self.records)}. Replay expects every sample to be scored once, in order."
            )
        self.scored = chosen.stop
        for sample in range(chosen.start, chosen.stop):
            record = self.records[sample]
            count = record.shape[0] if self.rows_that_matter is None else self.rows_that_matter[sample]
            self.rows += count
            self.missing += int(missing_rows(record[:count], self.layout).sum())
        return align(self.records[chosen], self.prompt_lengths[chosen], self.prompt_width, num_tokens, self.layout)

    def check_done(self) -> None:
        """Refuse a pass that left samples out."""
        if self.scored != len(self.records):
            raise RuntimeError(
                f"{self.scored} of {len(self.records)} samples were scored with their record. Replay expects every "
                "sample to be scored once, in order."
            )


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
