"""The lines of finished runs, and what they say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from benchmarks.map.results import Difference, paired

from .cells import Cell, Setting

END = 5  # averages over ten steps that an outcome is the mean of
MIN_SEEDS = 5  # below, an interval would say little: the seeds are told one by one

Line = dict[str, Any]
Cells = dict[Cell, dict[int, Line]]  # lines by cell and seed


def by_cell(lines: Iterable[Line]) -> Cells:
    """Lines by cell and seed."""
    cells: Cells = defaultdict(dict)
    for line in lines:
        cells[Cell.of(line)][line["seed"]] = line
    return dict(cells)


def reward_at_end(line: Line) -> float:
    """Mean reward of the last fifty steps."""
    return fmean(value for value in line["reward"][-END:] if value is not None)


def mean_of(lines: Iterable[Line], name: str, part: slice) -> float:
    """Mean over runs and a part of their measurements."""
    return fmean(value for line in lines for value in line[name][part] if value is not None)


def differences(setting: Setting, arm: str, cells: Cells, baseline: str = "live") -> list[float]:
    """How far an arm ends above another in the same setting, for each seed that both have."""
    first, second = cells.get(Cell(setting, arm), {}), cells.get(Cell(setting, baseline), {})
    return [reward_at_end(first[seed]) - reward_at_end(second[seed]) for seed in sorted(first.keys() & second.keys())]


def judged(values: list[float]) -> Difference | None:
    """Their mean with its interval, where there are enough of them."""
    return paired(values) if len(values) >= MIN_SEEDS else None
