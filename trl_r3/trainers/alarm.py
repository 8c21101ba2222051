"""The alarm: a record that does not fit its tokens stops the run before the optimizer moves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

from ..records.checks import MisalignedRecordError
from ..records.evidence import Observation, RoutingEvidence
from ..records.judgement import Verdict
from ..records.layout import RoutingLayout


class Alarm:
    """
    Collects what live routing says about the records, and judges them.

    Args:
        layout ([`RoutingLayout`]):
            Layers and experts of the model.
        action (`str`):
            `"error"`, `"warn"` or `"off"`.
        judges (`bool`):
            Whether records are judged: those that this package did not make itself.
    """

    def __init__(self, layout: RoutingLayout, action: str, judges: bool):
        self.action = action if judges else "off"
        self.layout = layout
        self.evidence = RoutingEvidence(layout)
        self.seen: Verdict | None = None  # the last statistics, until somebody takes them
        self._said = False

    def check(
        self, observations: Sequence[Observation], log: Callable[[str, float, float], None]
    ) -> MisalignedRecordError | None:
        """
        Judge what one or several forwards at the weights of their rollout have shown.

        With few rows the judgement waits for those of later rollouts, each at its own weights.

        Args:
            observations (sequence of [`Observation`]):
                What was seen.
            log (`Callable`):
                Given a metric, its value and 1.

        Returns:
            [`MisalignedRecordError`], *optional*: What is to be raised.
        """
        fresh = RoutingEvidence(self.layout)
        for observation in observations:
            fresh.add(observation)
            self.evidence.add(observation)
        if fresh.rows:
            seen = self.seen = fresh.statistics()
            for name, value in (("agreement", seen.agreement), ("contrast", seen.contrast)):
                if not math.isnan(value):
                    log(f"routing_replay/{name}", value, 1.0)
        verdict = self.evidence.verdict()
        if verdict is None:
            return None
        self.evidence.clear()
        if self.action == "off":
            return None
        if math.isnan(verdict.agreement):
            self._say_that_nothing_can_be_told()
        if verdict.fault is None:
            return None
        if self.action == "error":
            return MisalignedRecordError(verdict.fault)
        warnings.warn(verdict.fault, RuntimeWarning, stacklevel=2)
        return None

    def _say_that_nothing_can_be_told(self) -> None:
        if not self._said:
            self._said = True
            warnings.warn(
                "all rows of the rollout were routed to the same experts, live and in the record, so nothing can tell "
                "a right record from a moved one. If the routers are not meant to have collapsed, look at their "
                "auxiliary loss.",
                RuntimeWarning,
                stacklevel=2,
            )
