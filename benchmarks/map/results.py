"""The lines of finished runs, and what they say: differences between arms, with intervals."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from .cells import ARMS, Cell, Setting, Sizes

LAST = 3  # evaluations that an outcome is the mean of
MIN_SEEDS = 5
_DRAWS = 4_000

Line = dict[str, Any]
Cells = dict[Cell, dict[int, Line]]  # lines by cell and seed


def read(path: Path) -> list[Line]:
    """Finished runs, one a line of JSON; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def by_cell(lines: Iterable[Line], min_seeds: int = MIN_SEEDS) -> Cells:
    """The cells that have enough seeds, in the order of settings and arms."""
    cells: Cells = defaultdict(dict)
    for line in lines:
        cells[Cell.of(line)][line["seed"]] = line
    return {cell: cells[cell] for cell in sorted(cells, key=_order) if len(cells[cell]) >= min_seeds}


def _order(cell: Cell) -> tuple:
    setting = cell.setting
    kind, _, level = setting.rollout.partition(" ")
    numerics = ("exact", "bf16", "fp8", "noise").index(kind), float(level or 0)
    axes = setting.steps, numerics, setting.updates, setting.learning_rate
    return setting.gate != "softmax", *axes, list(ARMS).index(cell.arm)


def outcome(line: Line) -> float:
    """Accuracy of a run: the mean of its last evaluations."""
    return float(np.mean(line["accuracies"][-LAST:]))


def collapse_step(line: Line, evaluate_every: int = Sizes.evaluate_every) -> int | None:
    """Step of the first evaluation from which on accuracy stays below half of that of the start, if there is one."""
    below = np.asarray(line["accuracies"]) < line["before"] / 2
    stays = np.logical_and.accumulate(below[::-1])[::-1]
    return int(stays.argmax() + 1) * evaluate_every if stays.any() else None


@dataclass(frozen=True)
class Difference:
    """
    The mean of paired differences with its interval of 95 %.

    Args:
        mean, low, high (`float`):
            Mean, and percentiles of the means of resampled pairs.
        by_chance (`float`):
            Share of the sign patterns of the differences with which the interval would exclude zero: how often it
            does where the two arms are alike. A few seeds make it more than 0.05.
    """

    mean: float
    low: float
    high: float
    by_chance: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def paired(differences: Sequence[float]) -> Difference:
    """
    Judge paired differences by a bootstrap over the pairs.

    Args:
        differences (sequence of `float`):
            One a seed.
    """
    values = np.asarray(differences)
    draws = np.random.default_rng(0).integers(len(values), size=(_DRAWS, len(values)))
    # (draws, seeds): how often each seed was drawn, so that every sign pattern is one product
    counts = (draws[:, :, None] == np.arange(len(values))).sum(1) / len(values)
    signs = np.array(list(product((1, -1), repeat=len(values))))  # the first leaves all as they are
    low, high = np.percentile(counts @ (signs * values).T, [2.5, 97.5], axis=0)
    return Difference(float(values.mean()), float(low[0]), float(high[0]), float(((low > 0) | (high < 0)).mean()))


def differences(first: dict[int, Line], second: dict[int, Line], of: Callable = outcome) -> list[float]:
    """How far `first` is above `second`, for each seed that both have."""
    return [of(first[seed]) - of(second[seed]) for seed in sorted(first.keys() & second.keys())]


def to_live(cell: Cell, cells: Cells) -> Difference | None:
    """Difference of a cell to live training in the same setting; none of live training itself."""
    live = cells.get(Cell(cell.setting, "live"))
    return None if cell.arm == "live" or live is None else paired(differences(cells[cell], live))


def pooled(settings: Iterable[Setting], arm: str, cells: Cells, baseline: str = "live") -> Difference:
    """The difference of two arms, averaged over settings for each seed, then judged over seeds."""
    each = [differences(cells[Cell(setting, arm)], cells[Cell(setting, baseline)]) for setting in settings]
    return paired(np.mean(each, axis=0))


def price(settings: Iterable[Setting], cells: Cells) -> Difference:
    """What mismatch costs live training: the same without it, minus with it, averaged over settings for each seed."""
    each = [
        differences(
            cells[Cell(replace(each, rollout="exact"), "live")],
            cells[Cell(each, "live")],
        )
        for each in settings
    ]
    return paired(np.mean(each, axis=0))
