"""The rollouts whose samples an update may name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..engines.turns import Prompts, RolloutRecord
from ..records.checks import MisalignedRecordError
from ..records.samples import Sample
from .rollout import Rollout


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
        rollout.remove_files()
