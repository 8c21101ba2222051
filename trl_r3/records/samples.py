"""The samples of a rollout with their records, and the batches of them that are scored.

Legend: B batch, T tokens of a sequence (P prompt + C completion), L MoE layers, K experts per token, M observed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .checks import MisalignedRecordError
from .evidence import Observation
from .layout import RoutingLayout
from .sampling_masks import SamplingMask
from .storage import align, missing_rows

_OBSERVED_PAIRS = 256  # (row, layer) pairs of a sample whose live selection is looked at: enough to judge it by itself
_OBSERVED_ROWS = 8  # rows of a sample at least


@dataclass
class Sample:
    """
    One sequence of a rollout.

    Args:
        identity (`int`):
            What names it in the batches that it is part of, and in errors.
        tokens (`torch.Tensor` of shape `(T,)`):
            Its tokens, which the record was made for.
        prompt_length (`int`):
            Number of its prompt tokens.
        record (`torch.Tensor` of shape `(T - 1, L, K)`):
            Packed ids; of no rows where only sampling masks are recorded.
        rows_that_matter (`int`, *optional*):
            How many rows, from the first on, the loss depends on. All by default.
        mask ([`SamplingMask`], *optional*):
            What truncated sampling kept, one row a completion token.
    """

    identity: int
    tokens: Tensor
    prompt_length: int
    record: Tensor
    rows_that_matter: int | None = None
    mask: SamplingMask | None = None

    def missing(self, layout: RoutingLayout) -> tuple[int, int]:
        """Number of rows that the loss depends on, and how many of these have no record."""
        rows = self.record.numpy()[: self.rows_that_matter]
        return rows.shape[0], int(np.count_nonzero(rows[:, 0, 0] == layout.missing))

    def observed_rows(self, layout: RoutingLayout) -> Tensor:
        """Rows to look at, spread evenly over those whose neighbours are recorded, too."""
        whole = ~missing_rows(self.record, layout)
        inner = (whole[:-2] & whole[1:-1] & whole[2:]).nonzero()[:, 0] + 1
        count = max(_OBSERVED_ROWS, -(-_OBSERVED_PAIRS // len(layout.moe_layers)))
        if len(inner) <= count:
            return inner
        return inner[torch.linspace(0, len(inner) - 1, count).round().long()]


@dataclass
class ScoredBatch:
    """
    The records of a batch that one or several forwards score, a slice of its samples each.

    Args:
        samples (sequence of [`Sample`]):
            In the order of the batch.
        prompt_width (`int`):
            Width of the padded prompts.
        layout ([`RoutingLayout`]):
            Layers and experts of the model.
        observes (`bool`, *optional*, defaults to `False`):
            Whether to look at the live selection of some rows.
    """

    samples: Sequence[Sample]
    prompt_width: int
    layout: RoutingLayout
    observes: bool = False
    scored: int = field(default=0, init=False)
    rows: int = field(default=0, init=False)  # handed out, of those that matter
    missing: int = field(default=0, init=False)  # of these, without a record
    observed: Tensor | None = field(default=None, init=False)
    observations: list[Observation] = field(default_factory=list, init=False)
    _chosen: list[tuple[Sample, Tensor]] = field(default_factory=list, init=False)

    def take(self, batch_size: int, num_tokens: int, tokens: Tensor | None = None) -> Tensor:
        """Packed ids of shape `(B, T, L, K)` of the next `batch_size` samples: only these go to the device."""
        first, last = self.scored, self.scored + batch_size
        if last > len(self.samples):
            raise RuntimeError(
                f"a forward scores samples {first} to {last - 1}, but the batch has {len(self.samples)}. Replay "
                "expects every sample to be scored once, in order."
            )
        self.scored = last
        samples = self.samples[first:last]
        if tokens is not None:
            check_tokens(samples, tokens, self.prompt_width)
        for sample in samples:
            rows, missing = sample.missing(self.layout)
            self.rows, self.missing = self.rows + rows, self.missing + missing
        if self.observes:
            self._choose_rows(samples, num_tokens)
        records, lengths = [each.record for each in samples], [each.prompt_length for each in samples]
        return align(records, lengths, self.prompt_width, num_tokens, self.layout)

    def _choose_rows(self, samples: Sequence[Sample], num_tokens: int) -> None:
        self._chosen = [(sample, sample.observed_rows(self.layout)) for sample in samples]
        positions = [
            row * num_tokens + self.prompt_width - sample.prompt_length + rows
            for row, (sample, rows) in enumerate(self._chosen)
        ]
        observed = torch.cat(positions)
        self.observed = observed if len(observed) else None

    def observe(self, live_MLK: Tensor) -> None:
        """Take the live selection of the rows of `observed`."""
        of_samples = torch.cat([rows.new_full(rows.shape, sample.identity) for sample, rows in self._chosen])
        around = (torch.cat([sample.record[rows + step] for sample, rows in self._chosen]) for step in (0, -1, 1))
        recorded_MLK, before_MLK, after_MLK = around
        self.observations.append(Observation(of_samples, live_MLK, recorded_MLK, before_MLK, after_MLK))

    def check_batch(self, tokens: Tensor) -> None:
        """Hold the whole batch against the tokens of its records: a forward on embeddings shows none."""
        if tokens.shape[0] != len(self.samples):
            raise MisalignedRecordError(
                f"{tokens.shape[0]} sequences are scored with the records of {len(self.samples)} samples. Index "
                "`routed_samples` with the other tensors of the batch."
            )
        check_tokens(self.samples, tokens, self.prompt_width)

    def check_done(self) -> None:
        """Refuse a pass that left samples out."""
        if self.scored != len(self.samples):
            raise RuntimeError(
                f"{self.scored} of {len(self.samples)} samples were scored with their record. Replay expects every "
                "sample to be scored once, in order."
            )


def check_tokens(samples: Sequence[Sample], tokens: Tensor, prompt_width: int) -> None:
    """
    Refuse to replay records on other tokens than those they were made for.

    Args:
        samples (sequence of [`Sample`]):
            B samples.
        tokens (`torch.Tensor` of shape `(B, T)`):
            Input ids of the forward, prompts padded on the left and completions on the right.
        prompt_width (`int`):
            Width of the padded prompts.

    Raises:
        [`MisalignedRecordError`]: Naming the first sample and position, and both tokens.
    """
    told = np.full(tuple(tokens.shape), -1, dtype=np.int64)
    for row, sample in enumerate(samples):
        start = prompt_width - sample.prompt_length
        told[row, start : start + len(sample.tokens)] = sample.tokens.numpy()[: max(tokens.shape[1] - start, 0)]
    expected = torch.from_numpy(told).to(tokens.device)
    wrong = (expected != tokens) & (expected >= 0)
    if bool(wrong.any()):  # one wait for the device, before anything is computed from the wrong experts
        row, position = wrong.nonzero()[0].tolist()
        raise MisalignedRecordError(
            f"sample {samples[row].identity}: {int(wrong[row].sum())} tokens of the batch differ from those that its "
            f"record was made for, the first at position {position}: {int(tokens[row, position])} instead of "
            f"{int(expected[row, position])}. Whatever reorders or edits the batch has to index `routed_samples` and "
            "`masked_samples` with its other tensors, and to leave the tokens as they are."
        )
