"""What the routers of a rollout did, in TRL's log every so many steps: load by layer, and how it ages.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..alarm.evidence import RoutingEvidence
from ..records.expert_load import ExpertLoad
from ..records.metrics import AGES, agreement_at
from ..records.record import RoutingLayout
from ..records.samples import Observation, Sample
from .log import ReplayLog

PREFIX = "routing_replay/load"


class LoadLog:
    """
    Counts the records of a rollout where a log of the load is due, and how live routing agrees with them from update
    to update. Processes meet where [`ReplayLog`] does.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            That of the trainer.
        every (`int`):
            Steps from one to the next; 0 is never.
    """

    def __init__(self, accelerator: Any, every: int):
        self.every = every
        self.follows = False  # whether the updates on the present rollout are looked at
        self._accelerator = accelerator
        self._last: int | None = None  # step
        self._layout: RoutingLayout | None = None
        self._own: Tensor | None = None  # (L, E) of this process, since processes met
        self._shared: Tensor | None = None  # (L, E) of all, since the last log

    def take(self, samples: Sequence[Sample], layout: RoutingLayout, step: int) -> None:
        """
        Count a rollout, where that is due.

        Args:
            samples (sequence of [`Sample`]):
                With their records.
            layout ([`RoutingLayout`]):
                Layers and experts of the model.
            step (`int`):
                Optimizer steps that have been taken; several rollouts of a step are counted together.
        """
        self.follows = self._last is None or step == self._last or step - self._last >= self.every
        if not self.follows:
            return
        self._last, self._layout = step, layout
        for sample in samples:
            load_LE = sample.expert_load(layout)
            self._own = load_LE if self._own is None else self._own + load_LE

    def look(self, observations: Sequence[Observation], samples: Sequence[Sample], step: int, log: ReplayLog) -> None:
        """
        Log how an update's live selection agrees with records, by the number of updates since they were made.

        Args:
            observations (sequence of [`Observation`]):
                Some rows of the update.
            samples (sequence of [`Sample`]):
                Its samples.
            step (`int`):
                Optimizer steps that have been taken.
            log ([`ReplayLog`]):
                Where it goes.
        """
        if not self.follows or self._layout is None:
            return
        of_age: dict[int, list[int]] = {}
        for sample in samples:
            of_age.setdefault(step - sample.step, []).append(sample.identity)
        for age, identities in of_age.items():
            evidence = RoutingEvidence(self._layout)
            for each in observations:
                evidence.add(each.of(identities))
            agreement = evidence.statistics().agreement if evidence.rows else float("nan")
            if agreement == agreement:
                log.add(agreement_at(max(start for start in AGES if start <= age)), agreement, 1.0)

    def meet(self) -> None:
        """Add up what all processes have counted since they last met."""
        if self._own is None:
            return
        own, self._own = self._own, None
        if self._accelerator.num_processes > 1:
            own = self._accelerator.reduce(own.to(self._accelerator.device), reduction="sum").cpu()
        self._shared = own if self._shared is None else self._shared + own

    def collect(self) -> dict[str, float]:
        """What has come together, which is forgotten: of each layer, and of the worst of them."""
        if self._shared is None or self._layout is None:
            return {}
        load, self._shared = ExpertLoad(self._shared), None
        if not load.counts_LE.any():  # the loss depends on no row
            return {}
        by_name = {"max_over_mean": load.max_over_mean, "dead_experts": load.dead_experts, "entropy": load.entropy}
        logged: dict[str, float] = {}
        for name, each in by_name.items():
            logged[f"{PREFIX}/{name}"] = (each.min() if name == "entropy" else each.max()).item()  # of the worst layer
            for layer, value in zip(self._layout.moe_layers, each.tolist(), strict=True):
                logged[f"{PREFIX}/layer_{layer}/{name}"] = value
        return logged
