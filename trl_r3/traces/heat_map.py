"""Pictures by layer over steps: where routing is no longer that of the rollout, and where one expert takes the tokens.

Legend: S steps, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def new_figure(width: float, height: float) -> Figure:
    """A figure that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_changed_routers(
    axes: Axes, steps: Sequence[int], layers: Sequence[int], changed_LS: np.ndarray, edge: float
) -> None:
    """
    Draw the share of changed routers by layer over steps, with the edge of what is healthy in the colour bar.

    Args:
        axes (`matplotlib.axes.Axes`):
            Where to.
        steps (sequence of `int`):
            S steps, ascending.
        layers (sequence of `int`):
            Decoder-layer indices of the L MoE layers.
        changed_LS (`numpy.ndarray` of shape `(L, S)`):
            Share of (token, layer) pairs whose live selection differs from the recorded one.
        edge (`float`):
            Where the healthy range ends.
    """
    _draw(axes, steps, layers, changed_LS, 0.0, edge, "share of changed routers")


def draw_busiest_experts(
    axes: Axes, steps: Sequence[int], layers: Sequence[int], max_over_mean_LS: np.ndarray, edge: float
) -> None:
    """
    Draw the load of the busiest expert by layer over steps, likewise.

    Args:
        axes, steps, layers, edge:
            As in [`draw_changed_routers`].
        max_over_mean_LS (`numpy.ndarray` of shape `(L, S)`):
            Its load over the mean of its layer.
    """
    _draw(axes, steps, layers, max_over_mean_LS, 1.0, edge, "busiest expert, times the even share")


def _draw(
    axes: Axes, steps: Sequence[int], layers: Sequence[int], values_LS: np.ndarray, low: float, edge: float, label: str
) -> None:
    top = max(1.25 * edge, float(np.nanmax(values_LS, initial=0.0)))
    image = axes.imshow(
        values_LS, aspect="auto", origin="lower", interpolation="nearest", cmap="magma_r", vmin=low, vmax=top
    )
    axes.set(xlabel="step", ylabel="decoder layer")
    for axis, names in ((axes.xaxis, steps), (axes.yaxis, layers)):
        axis.set_major_locator(MaxNLocator(min(len(names), 12), integer=True))
        axis.set_major_formatter(partial(_name_at, names))
    bar = axes.figure.colorbar(image, ax=axes, label=f"{label}\n(healthy: below the green line)")
    bar.ax.axhline(edge, color="tab:green", linewidth=4)


def _name_at(names: Sequence[int], at: float, _: int | None) -> str:
    return str(names[int(at)]) if 0 <= at < len(names) else ""


def changed_routers(steps: Sequence[int], layers: Sequence[int], changed_LS: np.ndarray, edge: float) -> Figure:
    """The heat map alone; arguments as in [`draw_changed_routers`]."""
    figure, axes = _figure_of(layers, "changed routers")
    draw_changed_routers(axes, steps, layers, changed_LS, edge)
    return figure


def busiest_experts(steps: Sequence[int], layers: Sequence[int], max_over_mean_LS: np.ndarray, edge: float) -> Figure:
    """The heat map alone; arguments as in [`draw_busiest_experts`]."""
    figure, axes = _figure_of(layers, "load of the busiest expert")
    draw_busiest_experts(axes, steps, layers, max_over_mean_LS, edge)
    return figure


def _figure_of(layers: Sequence[int], title: str) -> tuple[Figure, Axes]:
    figure = new_figure(8, min(3 + 0.1 * len(layers), 8))
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes
