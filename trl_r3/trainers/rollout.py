"""One rollout of a trainer: its samples, and what a pass over some of them is about.

Legend: B batch, C completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..engines.turns import RolloutRecord
from ..records.checks import MisalignedRecordError, rows_that_matter
from ..records.layout import RoutingLayout
from ..records.samples import Sample, ScoredBatch
from ..records.sampling_masks import SamplingMask
from ..records.spill import SpilledRecords


@dataclass
class Rollout:
    """
    The samples of a rollout, by identity.

    Args:
        samples (list of [`Sample`]):
            With ascending identities.
        logprobs (list of `torch.Tensor` of shape `(C_i,)`, *optional*):
            Log-probabilities that they were sampled with.
        step (`int`):
            Optimizer steps that had been taken.
        spilled ([`SpilledRecords`], *optional*):
            The files of the records, where they are in files.
    """

    samples: list[Sample]
    logprobs: list[Tensor] | None
    step: int
    spilled: SpilledRecords | None = None

    @classmethod
    def of(cls, record: RolloutRecord, prompt_ids: list, completion_ids: list, *, first: int, step: int) -> Rollout:
        """Samples with identities from `first` on, which no earlier rollout has had."""
        tokens = [
            torch.tensor([*prompt, *completion]) for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
        ]
        masks: Sequence[SamplingMask | None] = record.masks or [None] * len(tokens)
        samples = [
            Sample(first + i, ids, length, rows, mask=mask)
            for i, (ids, length, rows, mask) in enumerate(
                zip(tokens, record.prompt_lengths, record.records, masks, strict=True)
            )
        ]
        return cls(samples, record.logprobs, step)

    @classmethod
    def after(
        cls, previous: Rollout | None, record: RolloutRecord, prompt_ids: list, completion_ids: list, *, step: int
    ) -> Rollout:
        """The rollout that replaces another one, if there was one: its identities go on."""
        first = 0 if previous is None else previous.first + len(previous.samples)
        return cls.of(record, prompt_ids, completion_ids, first=first, step=step)

    def spill(self, folder: str) -> OSError | None:
        """Put the records of the samples into files, and return what is to be raised if that fails."""
        self.remove_files()
        try:
            self.spilled = SpilledRecords(folder)
            for sample in self.samples:  # one after the other, so that memory is given back on the way
                (sample.record,) = self.spilled.take([sample.record])
        except (OSError, SafetensorError) as error:
            return OSError(
                f"the records of {len(self.samples)} samples cannot be written to `routing_replay_spill_dir` "
                f"{folder!r}: {error}. Set it to a folder with room for them, or to `None` to keep them in memory."
            )
        return None

    def release(self) -> None:
        """Give the records back, in memory or in files, when every update on them has been made."""
        for sample in self.samples:
            sample.record = sample.record[:0].clone()
        self.remove_files()

    def remove_files(self) -> None:
        """Remove the files of the records, if there are any."""
        if self.spilled is not None:
            self.spilled.remove()
            self.spilled = None

    @property
    def first(self) -> int:
        """The lowest identity."""
        return self.samples[0].identity if self.samples else 0

    def identities(self, device: torch.device) -> Tensor:
        """(B,) what travels with the batch: it is shuffled, split and indexed as the other tensors are."""
        return torch.tensor([sample.identity for sample in self.samples], device=device)

    def of_identities(self, identities: Sequence[int]) -> list[Sample]:
        """The samples of a batch, in its order."""
        last = self.first + len(self.samples) - 1
        wrong = [identity for identity in identities if not self.first <= identity <= last]
        if wrong:
            raise MisalignedRecordError(
                f"the batch names sample {wrong[0]}, but the rollout has {self.first} to {last}: it is that of an "
                "earlier rollout, or its `routed_samples` or `masked_samples` was edited. Train on the batch of the "
                "last rollout."
            )
        return [self.samples[identity - self.first] for identity in identities]

    def count_rows_that_matter(self, output: dict[str, Any]) -> None:
        """Note how many rows of each sample the loss of the scored batch depends on."""
        mask_BC = (output["completion_mask"] * output.get("tool_mask", 1)).bool().cpu()
        counts = rows_that_matter(mask_BC).sum(1).tolist()
        for sample, count in zip(self.samples, counts, strict=True):
            # the row before a token predicts it
            sample.rows_that_matter = sample.prompt_length - 1 + count if count else 0

    def refuse_missing(self, layout: RoutingLayout, allowed: float) -> RuntimeError | None:
        """What is to be raised if more of the rows that matter lack a record than are allowed to."""
        counts = [sample.missing(layout) for sample in self.samples]
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


@dataclass
class Scoring:
    """What the passes inside one call of TRL score."""

    samples: list[Sample] = field(default_factory=list)  # once there are completions
    inputs: dict[str, Any] | None = None  # of an update; without them: the passes over a fresh rollout
    old_logprobs: Tensor | None = None  # (B, C), if there is an old-policy pass
    batch: ScoredBatch | None = None  # of the last pass that replayed

    @property
    def has_old_policy(self) -> bool:
        """Whether TRL has scored the old policy for the batch of this update."""
        return self.inputs is not None and not self.inputs.keys().isdisjoint(("old_per_token_logps", "old_logps"))


def tokens_of_turn(prompt_ids: list[list[int]], generated: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions of what `_generate_single_turn` returned, copied: the tool loop goes on to edit them."""
    completion_ids = generated[0] if isinstance(generated, tuple) else generated  # RLOO has no log-probabilities
    return [list(ids) for ids in prompt_ids], [list(ids) for ids in completion_ids]
