"""Rollouts of a trainer: the turns that one is made of, its samples, and which of them are kept.

Legend: B batch, C completion tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..alarm.evidence import Verdict
from ..engines.known_routes import KnownRoutes
from ..engines.turns import MakeTurn, Prompts, RolloutRecord, Turn
from ..records.checks import MisalignedRecordError, rows_that_matter
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
    one_at_a_time: Any = field(default_factory=threading.RLock, init=False)  # for the threads of a `rollout_func`

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
            Sample(
                first + i, torch.tensor([*prompt, *completion], device="cpu"), length, rows, None, mask, values, step
            )
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


class KeptRollouts:
    """
    The rollouts of the batch that is trained on, and of earlier batches where a subclass goes on to use them.

    TRL makes one rollout a batch. A subclass may make several and join what it keeps (dynamic sampling), or train on
    samples of earlier batches (a replay buffer).

    Args:
        earlier (`int`, *optional*, defaults to `0`):
            Batches before the present one whose rollouts are kept.
    """

    def __init__(self, earlier: int = 0):
        self.earlier = earlier
        self.last: Rollout | None = None  # what the present rollout has given so far
        self._batches: list[list[Rollout]] = []
        self._identities = 0  # given out so far
        self._in_batch, self._starts_batch = False, True

    @property
    def samples(self) -> list[Sample]:
        """Those of the present batch, in the order of their identities."""
        return [sample for rollout in (self._batches or [[]])[-1] for sample in rollout.samples]

    @contextmanager
    def one_batch(self) -> Iterator[None]:
        """Let all rollouts inside be of one batch."""
        self._in_batch = self._starts_batch = True
        try:
            yield
        finally:
            self._in_batch, self._starts_batch = False, True

    def begin(self) -> None:
        """Before a rollout: earlier ones are given back first, so that memory never holds them and it."""
        self.last = None
        if self._starts_batch:
            while len(self._batches) > self.earlier:
                _remove_files(self._batches.pop(0))
            self._batches.append([])
            self._starts_batch = not self._in_batch

    def add(self, record: RolloutRecord, prompt_ids: Prompts, completion_ids: Prompts, step: int) -> Rollout:
        """
        Take what was recorded of the rollout that has begun, or of the next piece of it.

        Args:
            record ([`RolloutRecord`]):
                Of these completions.
            prompt_ids, completion_ids (sequence of `list[int]`):
                What will be scored.
            step (`int`):
                Optimizer steps that have been taken.

        Returns:
            [`Rollout`]: All of it so far.
        """
        added = Rollout.of(record, prompt_ids, completion_ids, first=self._identities, step=step)
        self._identities += len(added.samples)
        if self.last is None:
            self.last = added
            self._batches[-1].append(added)
        else:
            self.last.samples.extend(added.samples)
        return self.last

    def get_samples(self, identities: Sequence[int]) -> list[Sample]:
        """The samples of a batch, in its order."""
        held = {sample.identity: sample for batch in self._batches for rollout in batch for sample in rollout.samples}
        wrong = next((identity for identity in identities if identity not in held), None)
        if wrong is not None:
            span = f"{min(held)} to {max(held)}" if held else "no samples"
            raise MisalignedRecordError(
                f"the batch names sample {wrong}, but {span} are kept, of {len(self._batches)} batches: it is that of "
                "an earlier rollout, or its `rollout_samples` was edited. Train on the batch of the last rollout, or "
                "set `kept_rollouts` of the trainer's class, which is "
                f"{self.earlier}, to the number of earlier batches that samples are taken from."
            )
        return [held[identity] for identity in identities]

    def keep_only(self, micro_batches: list[dict[str, Any]]) -> None:
        """Give back what was rolled out for the present batch and no update of it will name."""
        named = [batch["rollout_samples"] for batch in micro_batches if "rollout_samples" in batch]
        if self.earlier or len(named) < len(micro_batches) or sum(map(len, named)) >= len(self.samples):
            return
        identities = {identity for each in named for identity in each.tolist()}
        for rollout in self._batches[-1]:
            rollout.samples = [sample for sample in rollout.samples if sample.identity in identities]
        _remove_files([rollout for rollout in self._batches[-1] if not rollout.samples])
        self._batches[-1] = [rollout for rollout in self._batches[-1] if rollout.samples]

    def drop(self) -> None:
        """Give all of them back, in memory or in files."""
        for batch in self._batches:
            _remove_files(batch)
        self.last, self._batches = None, []


def _remove_files(rollouts: list[Rollout]) -> None:
    for rollout in rollouts:
        rollout.samples = []  # NFS removes no file that is mapped
        rollout.remove_files()


@dataclass
class Scoring:
    """What the passes inside one call of TRL score."""

    samples: list[Sample] = field(default_factory=list)  # once there are completions
    batch: dict[str, Any] | None = None  # of an update; without it: the passes over a fresh rollout
    goes_live: bool = False  # whether routing is live on purpose, to compare with
    old_logprobs: Tensor | None = None  # (B, C), if there is an old-policy pass
    verdict: Verdict | None = None  # what live routing said of the records

    @property
    def is_update(self) -> bool:
        """Whether a loss is computed."""
        return self.batch is not None

    @property
    def has_old_policy(self) -> bool:
        """Whether TRL has scored the old policy for the batch of this update."""
        return self.batch is not None and not self.batch.keys().isdisjoint(("old_per_token_logps", "old_logps"))
