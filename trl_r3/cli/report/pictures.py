"""The pictures of a report: each with what is healthy drawn in, and a sentence on what to look for.

Legend: S steps, L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from ...alarm.judge import MIN_KAPPA
from ...traces.heat_map import (
    HEALTHY_CHANGED,
    HEALTHY_LOAD,
    busiest_experts,
    draw_changed_routers,
    new_figure,
)
from ...traces.trace_summary import Mismatch
from .run_data import TAUS, Curve, RunData

REPLAYED, LIVE, HEALTHY = "tab:blue", "tab:orange", "tab:green"
HEALTHY_K3 = 1e-3  # two forwards of one training engine differ by 8.4e-4 in the R3 paper (arXiv 2510.11370)
HEALTHY_EXTREME = 1e-3  # a rule of thumb: one token in a thousand
RIGHT_KAPPA = 0.8  # what right records measured at least (benchmarks/alarm_settings.md)
POOLED_STEPS = 10  # of the expert load: one step has few tokens
FLOOR = 1e-8  # nats; smaller differences are drawn there


@dataclass(frozen=True)
class Picture:
    """A picture and what to look for in it."""

    name: str
    title: str
    look_for: str
    figure: Figure


def pictures(data: RunData) -> list[Picture]:
    """All pictures that a run has data for."""
    drawn = (draw(data) for draw in DRAWN)
    return [picture for picture in drawn if picture is not None]


def _healthy(axes: Axes, low: float, high: float, label: str) -> None:
    axes.axhspan(low, high, color=HEALTHY, alpha=0.12, linewidth=0, label=label)


def _line(axes: Axes, curve: Curve, label: str, color: str, **style) -> None:
    if curve:
        marker = "." if len(curve) < 60 else None
        axes.plot(list(curve), list(curve.values()), label=label, color=color, marker=marker, **style)


def _finish(axes: Axes, **settings) -> None:
    axes.set(xlabel="step", **settings)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Below the axes and their label, where it covers nothing."""
    many = len(axes.get_legend_handles_labels()[1]) > 4
    below = axes.transAxes + ScaledTranslation(0, -0.42, axes.figure.dpi_scale_trans)  # inches
    axes.legend(
        fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, frameon=False,
        ncols=4 if many else 5,
    )  # fmt: skip


def _changed(data: RunData) -> Picture | None:
    routers, tokens = (data.curve(f"routing_replay/{name}") for name in ("changed_router_frac", "changed_token_frac"))
    if not routers:
        return None
    by_layer = [step for step in data.steps if step.compared_rows]
    height = min(3 + 0.1 * len(by_layer[0].changed), 8) if by_layer else 0
    figure = new_figure(10, 3.4 + height)
    curves, *below = figure.subplots(
        2 if by_layer else 1, 1, height_ratios=[3, height] if by_layer else None, squeeze=False
    )[:, 0]
    _line(curves, routers, "routers", REPLAYED)
    _line(curves, tokens, "tokens with a changed router", "tab:gray")
    _healthy(curves, 0, HEALTHY_CHANGED, "healthy for routers")
    _finish(
        curves, ylabel="share changed", ylim=(0, None), title="live selection against the record, while replay is on"
    )
    if below:
        assert data.facts is not None  # there are traces
        changed_LS = np.stack([(step.changed / step.compared_rows).numpy() for step in by_layer], axis=1)
        draw_changed_routers(below[0], [step.step + 1 for step in by_layer], data.facts.moe_layers, changed_LS)
        below[0].set_title("changed routers by decoder layer")
    return Picture(
        "changed_routers",
        "Changed routers",
        "Look for a level that creeps up with the steps (the record goes stale as the router learns) and for layers "
        "far above the others: about 0.1 is usual with a rollout in bfloat16, more with one in eight bits, and near 1 "
        "the record is not that of its tokens.",
        figure,
    )


def _load(data: RunData) -> Picture | None:
    steps = data.steps[-POOLED_STEPS:]
    if not steps or data.facts is None:
        return None
    layers, experts = data.facts.moe_layers, data.facts.num_experts
    counts = {
        "recorded": torch.stack([step.load_recorded for step in steps]).sum(0),
        "live": torch.stack([step.load_live for step in steps]).sum(0),
    }
    times = {way: (each / each.sum(1, keepdim=True).clamp(min=1) * experts).numpy() for way, each in counts.items()}
    figure = new_figure(13, min(3.8 + 0.1 * len(layers), 8))
    axes = figure.subplots(1, 3, width_ratios=[4, 4, 3], sharey=True)
    top = max(2.0, *(float(each.max()) for each in times.values()))
    for panel, (way, each) in zip(axes, times.items(), strict=False):
        image = panel.imshow(
            each, aspect="auto", origin="lower", interpolation="nearest", cmap="viridis", vmin=0, vmax=top
        )
        panel.set(title=way, xlabel="expert")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("decoder layer")
    axes[0].yaxis.set_major_locator(MaxNLocator(min(len(layers), 12), integer=True))
    axes[0].yaxis.set_major_formatter(lambda at, _: str(layers[int(at)]) if 0 <= at < len(layers) else "")
    figure.colorbar(image, ax=axes[1], label="times the even share")
    last, rows = axes[2], np.arange(len(layers))
    for (way, each), color, style in zip(times.items(), (REPLAYED, LIVE), ("-", "--"), strict=True):
        last.plot(each.max(1), rows, style, color=color, marker=".", label=way)
    last.axvspan(1, HEALTHY_LOAD, color=HEALTHY, alpha=0.12, linewidth=0, label="healthy")
    last.axvline(experts / data.facts.top_k, color="tab:red", linestyle=":", label="every token")
    last.set(title="busiest expert of a layer", xlabel="times the even share", xlim=(0, None))
    last.grid(alpha=0.3)
    _legend(last)
    first = f"steps {steps[0].step + 1} to {steps[-1].step + 1}" if len(steps) > 1 else f"step {steps[0].step + 1}"
    figure.suptitle(f"expert load, {first}")
    return Picture(
        "expert_load",
        "Expert load by layer",
        "Look for experts that are bright in one map and dark in the other (live routing has moved away from the "
        "rollout) and for a layer whose busiest expert nears the red line, where every token goes to it: that router "
        "collapses.",
        figure,
    )


def _load_over_steps(data: RunData) -> Picture | None:
    layers, by_step = data.busiest()
    if not by_step:
        return None
    steps = sorted(by_step)
    return Picture(
        "load_over_steps",
        "Busiest expert over steps",
        "Look for a layer that grows brighter with the steps: one expert takes ever more of its tokens, which an "
        "auxiliary loss, or a bias that balances, is there to prevent.",
        busiest_experts(steps, layers, np.array([by_step[step] for step in steps]).T),
    )


def _scatter(data: RunData) -> Picture | None:
    ways = {"replayed": REPLAYED, "live": LIVE}
    pooled = {way: [getattr(step, way) for step in data.steps if getattr(step, way).tokens] for way in ways}
    drawn = {way: each for way, each in pooled.items() if each}
    if not drawn:
        return None
    figure = new_figure(5.5 * len(drawn) + 0.5, 4.5)
    panels = figure.subplots(1, len(drawn), sharex=True, sharey=True, squeeze=False)[0]
    sizes = torch.cat([point[:, 1] for each in drawn.values() for mismatch in each for point in mismatch.points])
    lowest, highest = float(sizes.clamp(min=FLOOR).quantile(0.001)), float(sizes.max())
    for panel, (way, each) in zip(panels, drawn.items(), strict=True):
        points = torch.cat([point for mismatch in each for point in mismatch.points])
        panel.scatter(points[:, 0], points[:, 1].clamp(min=FLOOR), s=4, alpha=0.4, linewidth=0, color=ways[way])
        _healthy(panel, FLOOR / 10, math.log(2), "healthy: ratio below 2")
        panel.axhline(math.log(2), color=HEALTHY)
        panel.set(yscale="log", xlabel="log p of the rollout", title=_scatter_title(way, each))
        panel.grid(alpha=0.3)
        _legend(panel)
    panels[0].set_ylim(max(FLOOR, lowest / 3), max(2.0, 1.5 * highest))
    panels[0].set_ylabel("|delta log p|, rollout against training, nats")
    return Picture(
        "delta_logprob",
        "Rollout against training, token by token",
        "Look for tokens above the line at ln 2, which clipping and importance ratios react to, and for a cloud "
        "that is no lower with replay than with live routing: its cause is not routing but weights out of step, "
        "a temperature on one side or log-probabilities shifted by a token (drawn are tokens evenly picked, and "
        "the largest differences of each trace).",
        figure,
    )


def _scatter_title(way: str, each: list[Mismatch]) -> str:
    tokens, extreme = sum(one.tokens for one in each), sum(one.extreme[2.0] for one in each)
    return f"{way} routing: {extreme:,} of {tokens:,} tokens above 2"


def _mismatch(data: RunData) -> Picture | None:
    k3 = {"replayed": data.curve("sampling/k3_kl"), "live": data.curve("sampling/live/k3_kl")}
    if not any(k3.values()):
        return None
    figure = new_figure(11, 4.6)
    left, right = figure.subplots(1, 2)
    for (way, curve), color in zip(k3.items(), (REPLAYED, LIVE), strict=True):
        _line(left, curve, way, color)
        for tau, style in zip(TAUS, (":", "--", "-"), strict=True):
            _line(right, data.extreme(way, tau), f"{way}, tau {tau:g}", color, linestyle=style)
    lowest = min((value for curve in k3.values() for value in curve.values() if value > 0), default=1e-6)
    _healthy(left, 1e-16, HEALTHY_K3, "healthy")
    _healthy(right, 0, HEALTHY_EXTREME, "healthy, tau 2")
    _finish(
        left,
        yscale="log",
        ylim=(min(lowest, HEALTHY_K3) / 2, None),
        ylabel="k3",
        title="k3 between rollout and training",
    )
    right.set_yscale("symlog", linthresh=HEALTHY_EXTREME)
    _finish(right, ylabel="F(tau)", ylim=(0, None), title="share of tokens with a ratio above tau")
    return Picture(
        "mismatch",
        "Mismatch over steps",
        "Look for steps where replayed (blue) jumps or meets live (orange), and for a blue level above the band, "
        "which is about what two forwards of one training engine differ by in the R3 paper: what is left is not "
        "routing.",
        figure,
    )


def _agreement(data: RunData) -> Picture | None:
    agreement, contrast = (data.curve(f"routing_replay/{name}") for name in ("agreement", "contrast"))
    if not agreement:
        return None
    figure = new_figure(11, 3.8)
    left, right = figure.subplots(1, 2)
    _line(left, agreement, "agreement", REPLAYED)
    _healthy(left, RIGHT_KAPPA, 1, "healthy")
    left.axhline(MIN_KAPPA, color="tab:red", linestyle=":", label="the alarm looks closer below")
    _finish(left, ylabel="kappa", ylim=(min(0.0, *agreement.values()), 1.05), title="agreement, lowest layer")
    _line(right, contrast, "contrast", REPLAYED)
    _healthy(right, 0, max(0.1, *contrast.values()) * 1.1 if contrast else 1, "healthy")
    right.axhline(0, color="tab:red", linestyle=":", label="a moved record fits as well")
    _finish(right, ylabel="overlap", title="contrast with the record moved by one token")
    return Picture(
        "agreement",
        "Agreement and contrast",
        f"Look for a fall of agreement towards {MIN_KAPPA} or of contrast towards 0: both are measured at the weights "
        "of the rollout, so records then are those of other tokens, layers or weights.",
        figure,
    )


def _missing(data: RunData) -> Picture | None:
    missing, replayed = (data.curve(f"routing_replay/{name}") for name in ("missing_frac", "replayed_frac"))
    if not missing:
        return None
    figure = new_figure(10, 3.4)
    axes = figure.subplots()
    _line(axes, replayed, "replayed", REPLAYED)
    _line(axes, missing, "missing", "tab:red")
    axes.axhspan(-0.02, 0.02, color=HEALTHY, alpha=0.2, linewidth=0, label="healthy for missing")
    axes.axhspan(0.98, 1.02, color=HEALTHY, alpha=0.2, linewidth=0, label="healthy for replayed")
    _finish(axes, ylabel="share of rows", ylim=(-0.05, 1.05), title="rows that the loss depends on")
    return Picture(
        "missing_rows",
        "Missing rows",
        "Look for any step where missing is not 0 and replayed not 1: its tokens were trained through live experts, "
        "because the engine gave no routes for them or `live_routing()` let them.",
        figure,
    )


DRAWN: tuple[Callable[[RunData], Picture | None], ...] = (
    _changed,
    _load,
    _load_over_steps,
    _scatter,
    _mismatch,
    _agreement,
    _missing,
)
