"""What two runs differ by: means of their last logged steps, metric by metric."""

from __future__ import annotations

import math

from ...traces.healthy_ranges import MAX_OVER_MEAN
from .run_data import EXTREME, K3, LIVE_K3, TRAINING, RunData
from .run_verdict import means_of

COMPARED = (
    *TRAINING,
    K3,
    LIVE_K3,
    EXTREME,
    "routing_replay/changed_router_frac",
    "routing_replay/agreement",
    MAX_OVER_MEAN,
)


def last_means(data: RunData) -> dict[str, float]:
    """Mean of the last steps of each metric that a run has, NaN where it has diverged by then."""
    found = {}
    for name in COMPARED:
        curve = data.training.get(name) or data.curve(name)
        if max(data.diverged.get(name, {}), default=-1) > max(curve, default=-1):
            found[name] = math.nan
        elif curve:
            found[name] = list(means_of(curve).values())[-1]
    return found


def differences(one: RunData, other: RunData) -> list[tuple[str, list[str]]]:
    """
    Name of each metric that either run has, its value in both, and the second against the first.

    What spans orders of magnitude is compared by ratio, everything else by difference.
    """
    first, second = last_means(one), last_means(other)
    rows = []
    for name in dict.fromkeys([*first, *second]):
        pair = [values.get(name) for values in (first, second)]
        rows.append(
            (name, ["not logged" if value is None else f"{value:.3g}" for value in pair] + [_against(name, *pair)])
        )
    return rows


def _against(name: str, first: float | None, second: float | None) -> str:
    if first is None or second is None:
        return ""
    if not name.startswith("sampling/") or not first or not second:
        return f"{second - first:+.3g}"
    return f"{second / first:.2f} times"
