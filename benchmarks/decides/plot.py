"""The picture at the top of the page: reward and mismatch over the steps, seeds as bands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .cells import Cell, Setting, Sizes
from .grid import DECIDED
from .results import Cells, Line

CURVES = (
    (Cell(Setting("exact"), "live"), "no noise, live routing", "tab:gray"),
    (Cell(DECIDED, "live"), "live routing", "tab:red"),
    (Cell(DECIDED, "R3"), "replay", "tab:blue"),
)


def plot(cells: Cells, path: Path) -> None:
    """
    Write the picture.

    Args:
        cells ([`Cells`]):
            Finished runs.
        path (`Path`):
            File to write.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    reward, mismatch = figure.subplots(1, 2)
    for cell, name, color in CURVES:
        lines = list(cells.get(cell, {}).values())
        if not lines:
            continue
        every = Sizes.average_over
        _band(
            reward, [line["reward"] for line in lines], every * np.arange(1, len(lines[0]["reward"]) + 1), name, color
        )
        way = "k3_replay" if cell.arm == "R3" else "k3_live"
        _band(mismatch, [line[way] for line in lines], np.array(lines[0]["measured_at"]), name, color)
    reward.set(title="reward: share of rows sorted right", xlabel="step", ylim=(0, None))
    mismatch.set(title="k3: how far training is from the rollout", xlabel="step")
    for axes in (reward, mismatch):
        axes.grid(alpha=0.3)
    reward.legend(loc="lower right")
    mismatch.legend(loc="upper left")
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _band(axes: Any, series: list[Line], steps: np.ndarray, name: str, color: str) -> None:
    values = np.array(series, dtype=float)
    axes.plot(steps, values.mean(0), color=color, label=f"{name} ({len(values)} seeds)")
    axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
