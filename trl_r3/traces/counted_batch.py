"""How often each expert is selected, live and in the record, while a batch that is traced is scored.

Legend: B batch, T tokens, M rows that are counted, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..records.metrics import expert_load
from ..records.record import missing_rows
from ..records.samples import ScoredBatch


@dataclass
class CountedBatch:
    """
    The records of a batch, as [`ScoredBatch`] hands them out, with a count of what the rows that matter select.

    Args:
        batch ([`ScoredBatch`]):
            What it hands out, and what observes some of its rows.
    """

    batch: ScoredBatch
    sizes: list[tuple[int, int]] = field(default_factory=list, init=False)  # samples and width of each forward
    observed: Tensor | None = field(default=None, init=False)

    def __post_init__(self):
        layout = self.batch.layout
        shape = (len(layout.moe_layers), layout.num_experts)
        self.live_LE, self.recorded_LE = (torch.zeros(shape, dtype=torch.int64, device="cpu") for _ in range(2))

    def take(self, batch_size: int, num_tokens: int, tokens: Tensor | None = None) -> Tensor:
        """Packed ids of shape `(B, T, L, K)` of the next `batch_size` samples."""
        samples = self.batch.samples[self.batch.scored : self.batch.scored + batch_size]
        record = self.batch.take(batch_size, num_tokens, tokens)
        self.sizes.append((batch_size, num_tokens))
        rows_NLK = record.flatten(0, 1)
        whole_BT = ~missing_rows(record, self.batch.layout)
        for whole_T, sample in zip(whole_BT, samples, strict=True):
            if sample.rows_that_matter is not None:
                whole_T[self.batch.prompt_width - sample.prompt_length + sample.rows_that_matter :] = False
        whole = whole_BT.flatten().nonzero()[:, 0]
        self.observed = whole if len(whole) else None
        self.recorded_LE += expert_load(rows_NLK[whole], self.batch.layout.num_experts)
        return record

    def real(self, mask: Tensor) -> Tensor:
        """What the attention mask of a forward says, on the host."""
        return self.batch.real(mask)

    def take_packed(self, lengths: Sequence[int], tokens: Tensor | None = None) -> Tensor:
        """Refused: a trace says how its forwards were padded."""
        raise RuntimeError(
            f"a forward of {len(lengths)} samples in one row, without padding, cannot be traced: traces are replayed "
            "by padded forwards. Set `routing_replay_trace_dir=None`, or train with padding."
        )

    def observe(self, live_MLK: Tensor) -> None:
        """Take the live selection of the rows of `observed`."""
        assert self.observed is not None  # it was asked for
        self.live_LE += expert_load(live_MLK, self.batch.layout.num_experts)
        if self.batch.observed is not None:  # some of these rows
            self.batch.observe(live_MLK[torch.searchsorted(self.observed, self.batch.observed)])
