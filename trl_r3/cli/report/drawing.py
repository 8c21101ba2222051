"""What all pictures of a report share: their form, their colours, their axes."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from .run_data import Curve

LIVE, REPLAYED, HEALTHY = "tab:red", "tab:blue", "tab:green"  # the first two as in the plot of the demo


@dataclass(frozen=True)
class Picture:
    """A picture and what to look for in it."""

    name: str
    title: str
    look_for: str
    figure: Figure


def healthy(axes: Axes, low: float, high: float, label: str) -> None:
    """Shade what is healthy."""
    axes.axhspan(low, high, color=HEALTHY, alpha=0.12, linewidth=0, label=label)


def line(axes: Axes, curve: Curve, label: str, color: str, **style) -> None:
    """Draw a metric over steps, if there is any."""
    if curve:
        marker = "." if len(curve) < 60 else None
        axes.plot(list(curve), list(curve.values()), label=label, color=color, marker=marker, **style)


def finish(axes: Axes, columns: int = 5, **settings) -> None:
    """Label what has been drawn over steps."""
    axes.set(xlabel="step", **settings)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    legend(axes, columns)


def legend(axes: Axes, columns: int = 5) -> None:
    """Below the axes and their label, where it covers nothing."""
    below = axes.transAxes + ScaledTranslation(0, -0.42, axes.figure.dpi_scale_trans)  # inches
    axes.legend(
        fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, frameon=False, ncols=columns
    )  # fmt: skip
