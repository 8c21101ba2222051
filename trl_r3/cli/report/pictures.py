"""The pictures of a report, each with what is healthy drawn in, and a sentence on what to look for.

Legend: S steps, L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

from ...traces.healthy_ranges import MAX_OVER_MEAN
from ...traces.heat_map import busiest_experts, draw_changed_routers, new_figure
from ...traces.trace_summary import Mismatch
from .drawing import HEALTHY, LIVE, REPLAYED, Picture, finish, healthy, legend, line
from .run_data import RunData
from .step_curves import agreement, mismatch, missing

POOLED_STEPS = 10  # of the expert load: one step has few tokens
FLOOR = 1e-8  # nats; smaller differences are drawn there


def pictures(data: RunData) -> list[Picture]:
    """All pictures that a run has data for."""
    drawn = (draw(data) for draw in DRAWN)
    return [picture for picture in drawn if picture is not None]


def _changed(data: RunData) -> Picture | None:
    routers, tokens = (data.curve(f"routing_replay/{name}") for name in ("changed_router_frac", "changed_token_frac"))
    if not routers:
        return None
    edge = data.healthy["routing_replay/changed_router_frac"].high
    by_layer = [step for step in data.steps if step.compared_rows]
    height = min(3 + 0.1 * len(by_layer[0].changed), 8) if by_layer else 0
    figure = new_figure(10, 3.4 + height)
    curves, *below = figure.subplots(
        2 if by_layer else 1, 1, height_ratios=[3, height] if by_layer else None, squeeze=False
    )[:, 0]
    line(curves, routers, "routers", REPLAYED)
    line(curves, tokens, "tokens with a changed router", "tab:gray")
    healthy(curves, 0, edge, "healthy for routers")
    finish(
        curves, ylabel="share changed", ylim=(0, None), title="live selection against the record, while replay is on"
    )
    if below:
        assert data.facts is not None  # there are traces
        changed_LS = np.stack([(step.changed / step.compared_rows).numpy() for step in by_layer], axis=1)
        draw_changed_routers(below[0], [step.step + 1 for step in by_layer], data.facts.moe_layers, changed_LS, edge)
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
    last.axvspan(1, data.healthy[MAX_OVER_MEAN].high, color=HEALTHY, alpha=0.12, linewidth=0, label="healthy")
    last.axvline(experts / data.facts.top_k, color="black", linestyle=":", label="every token")
    last.set(title="busiest expert of a layer", xlabel="times the even share", xlim=(0, None))
    last.grid(alpha=0.3)
    legend(last)
    first = f"steps {steps[0].step + 1} to {steps[-1].step + 1}" if len(steps) > 1 else f"step {steps[0].step + 1}"
    figure.suptitle(f"expert load, {first}")
    return Picture(
        "expert_load",
        "Expert load by layer",
        "Look for experts that are bright in one map and dark in the other (live routing has moved away from the "
        "rollout) and for a layer whose busiest expert nears the dotted line, where every token goes to it: that "
        "router collapses.",
        figure,
    )


def _load_over_steps(data: RunData) -> Picture | None:
    layers, by_step = data.max_over_mean()
    if not by_step:
        return None
    steps = sorted(by_step)
    return Picture(
        "load_over_steps",
        "Busiest expert over steps",
        "Look for a layer that grows brighter with the steps: one expert takes ever more of its tokens, which an "
        "auxiliary loss, or a bias that balances, is there to prevent.",
        busiest_experts(
            steps, layers, np.array([by_step[step] for step in steps]).T, data.healthy[MAX_OVER_MEAN].high
        ),
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
        healthy(panel, FLOOR / 10, math.log(2), "healthy: ratio below 2")
        panel.axhline(math.log(2), color=HEALTHY)
        panel.set(yscale="log", xlabel="log p of the rollout", title=_scatter_title(way, each))
        panel.grid(alpha=0.3)
        legend(panel)
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


DRAWN: tuple[Callable[[RunData], Picture | None], ...] = (
    mismatch,  # beside the verdict
    _changed,
    _load,
    _load_over_steps,
    _scatter,
    agreement,
    missing,
)
