"""GRPO with the rollouts and the arms of this study."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from benchmarks.map.trainer import MapTrainer

from .numerics import rollout_numerics


class DecidingTrainer(MapTrainer):
    """[`MapTrainer`] with the rollouts of this study."""

    def _rollout_numerics(self, model: Any) -> AbstractContextManager[None]:
        return rollout_numerics(self.rollout, model, self.noise)
