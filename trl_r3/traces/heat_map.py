"""The picture that tells most about a run: which layers route otherwise than the rollout did, step by step.

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

HEALTHY_CHANGED = 0.2  # the R3 paper saw 0.1 of the routers change (arXiv 2510.11370, a rollout in bfloat16)


def new_figure(width: float, height: float) -> Figure:
    """A figure that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_changed_routers(axes: Axes, steps: Sequence[int], layers: Sequence[int], changed_LS: np.ndarray) -> None:
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
    """
    top = max(1.25 * HEALTHY_CHANGED, float(np.nanmax(changed_LS, initial=0.0)))
    image = axes.imshow(
        changed_LS, aspect="auto", origin="lower", interpolation="nearest", cmap="magma_r", vmin=0, vmax=top
    )
    axes.set(xlabel="step", ylabel="decoder layer")
    for axis, names in ((axes.xaxis, steps), (axes.yaxis, layers)):
        axis.set_major_locator(MaxNLocator(min(len(names), 12), integer=True))
        axis.set_major_formatter(partial(_name_at, names))
    bar = axes.figure.colorbar(image, ax=axes, label="share of changed routers\n(healthy: below the green line)")
    bar.ax.axhline(HEALTHY_CHANGED, color="tab:green", linewidth=4)


def _name_at(names: Sequence[int], at: float, _: int | None) -> str:
    return str(names[int(at)]) if 0 <= at < len(names) else ""


def changed_routers(steps: Sequence[int], layers: Sequence[int], changed_LS: np.ndarray) -> Figure:
    """The heat map alone; arguments as in [`draw_changed_routers`]."""
    figure = new_figure(8, min(3 + 0.1 * len(layers), 8))
    axes = figure.subplots()
    axes.set_title("changed routers")
    draw_changed_routers(axes, steps, layers, changed_LS)
    return figure
