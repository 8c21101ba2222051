"""One rollout of a trainer: the turns that it is made of, then its samples.

Legend: B batch, C completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..engines.known_routes import KnownRoutes
from ..engines.turns import MakeTurn, Prompts, RolloutRecord, Turn
from ..records.checks import rows_that_matter
from ..records.record import RoutingLayout
from ..records.samples import Sample
from ..records.sampling_mask import SamplingMask
from ..records.spill import SpilledTensors


@dataclass
class Turns:
    """
    What the engine has been asked for in a rollout so far.

    Args:
        known ([`KnownRoutes`], *optional*):
            Rows that vLLM has returned, where later turns go on from earlier ones.
    """

    known: KnownRoutes | None = None
    made: list[Turn] = field(default_factory=list, init=False)
    error: Exception | None = field(default=None, init=False)

    def add(self, make_turn: MakeTurn, prompt_ids: Prompts, generated: Any) -> None:
        """Take what one call of `_generate_single_turn` returned."""
        completion_ids = generated[0] if isinstance(generated, tuple) else generated  # RLOO has no log-probabilities
        try:
            # copied: the tool loop goes on to edit them
            self.made.append(make_turn([list(ids) for ids in prompt_ids], [list(ids) for ids in completion_ids]))
        except (RuntimeError, ValueError) as error:
            # other processes go on to meet this one where TRL gathers lengths: raised when that is over
            self.error = self.error or error


@dataclass
class Rollout:
    """
    The samples of a rollout, by identity.

    Args:
        samples (list of [`Sample`]):
            With ascending identities.
        spilled ([`SpilledTensors`], *optional*):
            The files of what was recorded, where it is in files.
    """

    samples: list[Sample]
    spilled: SpilledTensors | None = None

    @classmethod
    def of(
        cls, record: RolloutRecord, prompt_ids: Prompts, completion_ids: Prompts, *, first: int, step: int
    ) -> Rollout:
        """Samples with identities from `first` on, which no earlier rollout has had."""
        nothing: Sequence[None] = [None] * len(prompt_ids)
        masks: Sequence[SamplingMask | None] = record.masks or nothing
        logprobs: Sequence[Tensor | None] = record.logprobs or nothing
        parts = zip(prompt_ids, completion_ids, record.prompt_lengths, record.records, masks, logprobs, strict=True)
        samples = [
            Sample(first + i, torch.tensor([*prompt, *completion]), length, rows, None, mask, values, step)
            for i, (prompt, completion, length, rows, mask, values) in enumerate(parts)
        ]
        return cls(samples)

    def spill(self, folder: str) -> OSError | None:
        """Put what was recorded of the samples into files, and return what is to be raised if that fails."""
        self.remove_files()
        try:
            self.spilled = SpilledTensors(folder)
            for sample in self.samples:  # one after the other, so that memory is given back on the way
                sample.record = self.spilled.take(sample.record)
                if sample.mask is not None:
                    sample.mask = SamplingMask(*map(self.spilled.take, (sample.mask.ids, sample.mask.offsets)))
        except (OSError, SafetensorError) as error:
            return OSError(
                f"the records of {len(self.samples)} samples cannot be written to `routing_replay_spill_dir` "
                f"{folder!r}: {error}. Set it to a folder with room for them, or to `None` to keep them in memory."
            )
        return None

    def remove_files(self) -> None:
        """Remove the files of the records, if there are any."""
        if self.spilled is not None:
            self.spilled.remove()
            self.spilled = None

    def identities(self, device: torch.device) -> Tensor:
        """(B,) what travels with the batch: it is shuffled, split and indexed as the other tensors are."""
        return torch.tensor([sample.identity for sample in self.samples], device=device)

    def refuse_missing(self, layout: RoutingLayout, allowed: float) -> RuntimeError | None:
        """What is to be raised if more of the rows that matter lack a record than are allowed to."""
        counts = [sample.count_rows(layout) for sample in self.samples]
        rows, missing = (sum(column) for column in zip(*counts, strict=True))
        share = missing / max(rows, 1)
        if share <= allowed:
            return None
        first = next(i for i, (_, count) in enumerate(counts) if count)
        return RuntimeError(
            f"{share:.2%} of the rollout's rows have no record, the first in sample {first}, counting those that the "
            f"loss depends on, but `routing_replay_max_missing` allows {allowed:.2%}. Fix the rollout, or set "
            "`routing_replay_max_missing` to let these rows route live."
        )


def note_rows_that_matter(samples: Sequence[Sample], mask_BC: Tensor) -> None:
    """Note how many rows of each sample the loss depends on, given the completion tokens that it counts."""
    counts = rows_that_matter(mask_BC.bool().cpu()).sum(1).tolist()
    for sample, count in zip(samples, counts, strict=True):
        # the row before a token predicts it
        sample.rows_that_matter = sample.prompt_length - 1 + count if count else 0
