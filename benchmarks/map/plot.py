"""The map as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .cells import ARMS, Cell, Setting
from .grid import NOISE
from .results import Cells, Line, by_cell, outcome, to_live

_PLANE = ("softmax", NOISE, Setting.steps)
_LIMIT = 0.15  # difference at which the colours end
_COLORS = {"ahead": "tab:green", "behind": "tab:red", "unclear": "0.55"}


def plot(lines: Sequence[Line], path: Path) -> None:
    """
    Write the picture.

    Args:
        lines (sequence of `dict`):
            Finished runs.
        path (`Path`):
            File to write.
    """
    cells = by_cell(lines)
    figure = Figure(figsize=(13, 6), layout="constrained")
    FigureCanvasAgg(figure)
    plane, forest = figure.subplots(1, 2, width_ratios=[1, 1.25])
    _draw_plane(plane, cells)
    _draw_forest(forest, cells)
    figure.savefig(path, dpi=90)


def _draw_plane(axes: Any, cells: Cells) -> None:
    """R3 minus live over learning rate and updates."""
    settings = [
        cell.setting
        for cell in cells
        if cell.arm == "R3" and (cell.setting.gate, cell.setting.rollout, cell.setting.steps) == _PLANE
    ]
    rates = sorted({each.learning_rate for each in settings})
    updates = sorted({each.updates for each in settings})
    values = np.full((len(updates), len(rates)), np.nan)
    for each in settings:
        row, column = updates.index(each.updates), rates.index(each.learning_rate)
        live, replayed = (np.mean([*map(outcome, cells[Cell(each, arm)].values())]) for arm in ("live", "R3"))
        found = to_live(Cell(each, "R3"), cells)
        assert found is not None  # R3 is compared
        values[row, column] = found.mean
        text = f"{found.mean:+.3f}\n[{found.low:+.3f}, {found.high:+.3f}]\n{live:.2f} to {replayed:.2f}"
        axes.text(column, row, text, ha="center", va="center", weight="bold" if found.is_clear else "normal")
    axes.imshow(values, cmap="PiYG", vmin=-_LIMIT, vmax=_LIMIT, aspect="auto", origin="lower")
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(updates)), map(str, updates))
    axes.set(xlabel="learning rate", ylabel="updates a rollout")
    axes.set_title(f"R3 minus live, softmax gate, {NOISE}\n(bold: interval excludes 0; below: accuracy live to R3)")


def _draw_forest(axes: Any, cells: Cells) -> None:
    """Every other comparison with live training."""
    shown = [(cell, found) for cell in cells if (found := to_live(cell, cells)) is not None and not _is_in_plane(cell)]
    shown.sort(key=lambda each: (list(ARMS).index(each[0].arm), each[0].setting.gate != "softmax"))
    for height, (_, found) in enumerate(reversed(shown)):
        side = "unclear" if not found.is_clear else "ahead" if found.mean > 0 else "behind"
        axes.plot([found.low, found.high], [height, height], color=_COLORS[side])
        axes.plot(found.mean, height, "o", color=_COLORS[side], markersize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [_label(cell.setting, cell.arm) for cell, _ in reversed(shown)], fontsize=8)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.set(title="the other cells: arm minus live, accuracy, 95 % interval")
    axes.grid(axis="x", alpha=0.3)


def _is_in_plane(cell: Cell) -> bool:
    return cell.arm == "R3" and (cell.setting.gate, cell.setting.rollout, cell.setting.steps) == _PLANE


def _label(setting: Setting, arm: str) -> str:
    gate = "" if setting.gate == "softmax" else ", sigmoid gate"
    long = "" if setting.steps == Setting.steps else f", {setting.steps} steps"
    return f"{arm}: {setting.rollout}{gate}, {setting.updates} updates, lr {setting.learning_rate:g}{long}"
