"""Pictures of metrics over steps, of one run or of two: mismatch beside training, agreement, missing rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from ...alarm.judge import MIN_KAPPA
from ...traces.healthy_ranges import EXTREME, KAPPA
from ...traces.healthy_ranges import K3 as HEALTHY_K3
from ...traces.heat_map import new_figure
from .drawing import HEALTHY, LIVE, REPLAYED, Picture, finish, healthy, line
from .run_data import K3, LIVE_K3, MISSING_ROWS, TAUS, TRAINING, RunData

K3_OF = {"replayed": K3, "live": LIVE_K3}
STYLES = ("-", "--")  # of the runs; colours are the ways of routing
COLUMNS = 3


def mismatch(*runs: RunData) -> Picture | None:
    """k3 and F(tau), and beside them what TRL logged of training: a panel for each that any of the runs has."""
    has_k3 = any(run.curve(name) for run in runs for name in K3_OF.values())
    named = {name: label for name, label in TRAINING.items() if any(name in run.training for run in runs)}
    count = 2 * has_k3 + len(named)
    if not count:
        return None
    rows = math.ceil(count / COLUMNS)
    figure = new_figure(4.4 * min(count, COLUMNS) + 0.5, 4.3 * rows)
    axes = list(figure.subplots(rows, min(count, COLUMNS), squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    if has_k3:
        _k3(axes[0], runs)
        _extreme(axes[1], runs)
    for panel, (name, label) in zip(axes[2 * has_k3 :], named.items(), strict=False):
        for letter, style, run in _styled(runs):
            way, color = _ways(run)["replayed"]
            line(panel, run.training.get(name, {}), f"{letter}{way}", color, linestyle=style)
        finish(panel, title=label)
    return Picture(
        "mismatch",
        "Mismatch and training over steps" if named and has_k3 else "Mismatch over steps" if has_k3 else "Training",
        "Look for steps where replayed (blue) jumps or meets live (red), and for a blue level above the band, "
        "which is about what two forwards of one training engine differ by in the R3 paper: what is left is not "
        "routing. A mismatch that hurts shows beside it: reward stops, entropy falls fast, or the clip ratio grows.",
        figure,
    )


def _styled(runs: Sequence[RunData]) -> list[tuple[str, str, RunData]]:
    letters = ("A ", "B ") if len(runs) > 1 else ("",)
    return list(zip(letters, STYLES, runs, strict=False))


def _ways(run: RunData) -> dict[str, tuple[str, str]]:
    """How its curves are called and drawn: what the log calls replayed is live where nothing was replayed."""
    live = ("live", LIVE)
    return {"replayed": ("replayed", REPLAYED), "live": live} if run.replays else {"replayed": live}


def _k3(axes: Axes, runs: Sequence[RunData]) -> None:
    curves = [
        (run.curve(K3_OF[way]), f"{letter}{label}", color, style)
        for letter, style, run in _styled(runs)
        for way, (label, color) in _ways(run).items()
    ]
    lowest = min((value for curve, *_ in curves for value in curve.values() if value > 0), default=HEALTHY_K3)
    floor = min(lowest, HEALTHY_K3) / 2
    for curve, label, color, style in curves:
        shown = {step: max(value, floor) for step, value in curve.items()}  # 0 has no place on a logarithmic axis
        line(axes, shown, label, color, linestyle=style)
    healthy(axes, 1e-16, HEALTHY_K3, "healthy")
    finish(axes, 3, yscale="log", ylim=(floor, None), title="k3 between rollout and training")


def _extreme(axes: Axes, runs: Sequence[RunData]) -> None:
    taus = dict(zip(TAUS, (":", "--", "-"), strict=True)) if len(runs) == 1 else {TAUS[-1]: None}
    for letter, of_run, run in _styled(runs):
        for way, (label, color) in _ways(run).items():
            for tau, style in taus.items():
                line(axes, run.extreme(way, tau), f"{letter}{label}, tau {tau:g}", color, linestyle=style or of_run)
    healthy(axes, 0, EXTREME, "healthy, tau 2")
    axes.set_yscale("symlog", linthresh=EXTREME)
    finish(axes, 2, ylim=(0, None), title="F(tau): share of tokens with a ratio above tau")


def agreement(data: RunData) -> Picture | None:
    """Agreement, and contrast where it is known, too."""
    kappa, contrast = (data.curve(f"routing_replay/{name}") for name in ("agreement", "contrast"))
    if not kappa:
        return None
    figure = new_figure(11 if contrast else 6, 3.8)
    left, *right = figure.subplots(1, 2 if contrast else 1, squeeze=False)[0]
    line(left, kappa, "agreement", REPLAYED)
    healthy(left, KAPPA, 1, "healthy")
    left.axhline(MIN_KAPPA, color="black", linestyle=":", label="the alarm looks closer below")
    finish(left, ylabel="kappa", ylim=(min(0.0, *kappa.values()), 1.05), title="agreement, lowest layer")
    for axes in right:
        line(axes, contrast, "contrast", REPLAYED)
        healthy(axes, 0, max(0.1, *contrast.values()) * 1.1, "healthy")
        axes.axhline(0, color="black", linestyle=":", label="a moved record fits as well")
        finish(axes, ylabel="overlap", title="contrast with the record moved by one token")
    return Picture(
        "agreement",
        "Agreement and contrast",
        f"Look for a fall of agreement towards {MIN_KAPPA} or of contrast towards 0: both are measured at the weights "
        "of the rollout, so records then are those of other tokens, layers or weights.",
        figure,
    )


def missing(data: RunData) -> Picture | None:
    """Rows without a record, and those that were replayed."""
    lacking, replayed = data.curve(MISSING_ROWS), data.curve("routing_replay/replayed_frac")
    if not lacking:
        return None
    figure = new_figure(10, 3.4)
    axes = figure.subplots()
    line(axes, replayed, "replayed", REPLAYED)
    line(axes, lacking, "missing", "black")
    axes.axhspan(-0.02, 0.02, color=HEALTHY, alpha=0.2, linewidth=0, label="healthy for missing")
    axes.axhspan(0.98, 1.02, color=HEALTHY, alpha=0.2, linewidth=0, label="healthy for replayed")
    finish(axes, ylabel="share of rows", ylim=(-0.05, 1.05), title="rows that the loss depends on")
    return Picture(
        "missing_rows",
        "Missing rows",
        "Look for any step where missing is not 0 and replayed not 1: its tokens were trained through live experts, "
        "because the engine gave no routes for them or `live_routing()` let them.",
        figure,
    )
