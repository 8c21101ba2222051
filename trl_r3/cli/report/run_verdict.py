"""Whether a run is healthy: which metric is outside its range and since when, and by how much replay cut k3."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from ...traces.healthy_ranges import A_NUMBER, MAX_OVER_MEAN, HealthyRange
from .run_data import K3, LIVE_K3, MISSING_ROWS, TRAINING, Curve, RunData

WINDOW = 10  # logged steps of a mean: a single batch scatters by a factor of ten
EQUAL = 0.1  # share by which medians of k3 may differ without saying anything


@dataclass(frozen=True)
class JudgedMetric:
    """
    A metric against its range.

    Args:
        name (`str`):
            As it is logged.
        value (`float`):
            Mean of the last steps, or the one that is farthest outside.
        healthy ([`HealthyRange`]):
            Its range.
        since, until (`int`, *optional*):
            The last steps at which it was outside; `until` is `None` where the run ends so.
        where (`str`, *optional*):
            The worst layer.
    """

    name: str
    value: float
    healthy: HealthyRange
    since: int | None = None
    until: int | None = None
    where: str = ""

    @property
    def is_healthy(self) -> bool:
        """Whether it was inside at all steps."""
        return self.since is None

    def __str__(self) -> str:
        steps = f"since step {self.since}" if self.until is None else f"from step {self.since} to {self.until}"
        when = "" if self.is_healthy else f", outside {steps}"
        return f"{self.name} reached {self.value:.3g}{self.where}{when}; healthy is {self.healthy}"


@dataclass(frozen=True)
class K3Cut:
    """k3 of the same rollouts scored both ways: medians over so many steps."""

    live: float
    replayed: float
    steps: int

    @property
    def times(self) -> float:
        """How many times lower it is with replay."""
        return self.live / self.replayed if self.replayed else math.inf

    def __str__(self) -> str:
        medians = f"{self.live:.2g} live, {self.replayed:.2g} replayed: medians of {self.steps} steps scored both ways"
        if self.live == self.replayed or abs(self.times - 1) <= EQUAL:
            return f"k3 is the same with replay and without ({medians}): routing is not the mismatch of this run."
        if self.times < 1:
            return f"Replay raised k3 by a factor of {1 / self.times:.1f} ({medians}): look at agreement."
        factor = f"{self.times:.1f}" if self.times < 1000 else "more than 1,000"
        return f"Replay lowered k3 {'to 0' if math.isinf(self.times) else f'by a factor of {factor}'} ({medians})."


@dataclass(frozen=True)
class RunVerdict:
    """What a run's metrics come to. Nothing is judged of a run without replay."""

    judged: list[JudgedMetric]
    cut: K3Cut | None

    @property
    def unhealthy(self) -> list[JudgedMetric]:
        """Metrics that are or were outside their range, in the order of their weight."""
        return [each for each in self.judged if not each.is_healthy]

    @property
    def is_healthy(self) -> bool | None:
        """`None` where there is nothing to judge."""
        return not self.unhealthy if self.judged else None

    @property
    def headline(self) -> str:
        """In a few words."""
        if self.is_healthy is None:
            return "Not judged: no metric of replay"
        count = len(self.unhealthy)
        return "Healthy" if not count else f"Not healthy: {count} of {len(self.judged)} metrics outside their range"

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what has no bound is `null`."""
        return {
            "healthy": self.is_healthy,
            "metrics": {
                each.name: {
                    "healthy": each.is_healthy,
                    "value": each.value if math.isfinite(each.value) else None,
                    "range": _bounds(each.healthy),
                    "since_step": each.since,
                    "until_step": each.until,
                }
                for each in self.judged
            },
            "k3": self.cut and {**vars(self.cut), "times": None if math.isinf(self.cut.times) else self.cut.times},
        }


def judge_run(data: RunData) -> RunVerdict:
    """
    Hold the metrics of a run against their ranges.

    Args:
        data ([`RunData`]):
            What was read.

    Returns:
        [`RunVerdict`].
    """
    if not data.replays:
        return RunVerdict([], None)
    layers, by_step = data.max_over_mean()
    judged = []
    for name, healthy in data.healthy.items():
        curve, where = {**data.curve(name), **data.diverged.get(name, {})}, ""
        if name == MAX_OVER_MEAN and by_step:
            last = by_step[max(by_step)]
            where = f" (layer {layers[last.index(max(last))]})"
        if curve:
            judged.append(_judge(name, curve, healthy, 1 if name == MISSING_ROWS else WINDOW, where))
    for name in TRAINING:
        if name in data.diverged:
            judged.append(_judge(name, {**data.training.get(name, {}), **data.diverged[name]}, A_NUMBER, 1, ""))
    return RunVerdict(judged, _cut(data))


def _bounds(healthy: HealthyRange) -> list[float | None]:
    """For JSON."""
    return [None, None] if healthy == A_NUMBER else [healthy.low, None if math.isinf(healthy.high) else healthy.high]


def _judge(name: str, curve: Curve, healthy: HealthyRange, window: int, where: str) -> JudgedMetric:
    window = min(window, len(curve))
    means = means_of(curve, window)
    outside = [step for step, value in means.items() if value not in healthy]
    if not outside:
        return JudgedMetric(name, list(means.values())[-1], healthy, where=where)
    steps = list(means)
    end = begin = steps.index(outside[-1])
    while begin and means[steps[begin - 1]] not in healthy:
        begin -= 1
    first = sorted(curve)[begin : begin + window]  # of which the mean is outside
    since = next(step for step in first if curve[step] not in healthy)
    stretch = [means[step] for step in steps[begin : end + 1]]
    farthest = max(
        stretch, key=lambda value: math.inf if math.isnan(value) else max(healthy.low - value, value - healthy.high)
    )
    until = None if end == len(steps) - 1 else steps[end]
    return JudgedMetric(name, farthest, healthy, since, until, where)


def means_of(curve: Curve, window: int = WINDOW) -> Curve:
    """Means of so many steps, each at its last; of all there are, where there are fewer."""
    steps, values = sorted(curve), [curve[step] for step in sorted(curve)]
    window = min(window, len(steps))
    return {steps[end - 1]: statistics.fmean(values[end - window : end]) for end in range(window, len(steps) + 1)}


def _cut(data: RunData) -> K3Cut | None:
    replayed, live = data.curve(K3), data.curve(LIVE_K3)
    both = sorted(replayed.keys() & live.keys())
    if not both or (data.facts is not None and data.facts.mode == "R2"):  # whose old policy is scored live
        return None
    of_live, of_replayed = (statistics.median(curve[step] for step in both) for curve in (live, replayed))
    return K3Cut(of_live, of_replayed, len(both))
