"""What the passes inside one call of TRL score: samples of a rollout, before an update or in it.

Legend: B batch, C completion tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ..alarm.evidence import Verdict
from ..records.samples import Sample
from .attaching import ReplayingTrainer

Scores = tuple[Tensor, Tensor | None]  # (B, C) log-probabilities and entropies


class ScoringTrainer(ReplayingTrainer, Protocol):
    """What a session asks of a trainer, beside what attaching does."""

    ref_model: Any
    top_p: float
    top_k: int
    min_p: float | None


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
