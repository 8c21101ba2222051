"""The table, the plot and the log of two ways to train on noisy rollouts."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from .noisy_runs import REPLAY, NoisyResult, NoisyRun, NoisySettings

HOW_LARGE = (
    "This mismatch is made, and large: noise of {noise:g} standard deviations on the router logits of the rollout, "
    "which changes {changed:.0%} of its expert selections and gives a k3 of {k3:.2f} before the first update. Real "
    "engines give 0.001 to 0.01 in bfloat16 and fp8, where no gain was found; gains began at about 0.05 "
    "(docs/when_it_helps.md). `trl-r3 report` calls such a run unhealthy: no real engine agrees so little."
)


def noisy_rows(result: NoisyResult) -> list[tuple[str, dict[str, float], str]]:
    """
    The table of a demo.

    Returns:
        list of `tuple[str, dict[str, float], str]`: What is measured, its value for each way, and its format.
    """

    def mean(of_run: Callable[[str, NoisyRun], float]) -> dict[str, float]:
        return {way: fmean(of_run(way, run) for run in runs) for way, runs in result.runs.items()}

    def mismatch(key: str, part: slice) -> dict[str, float]:
        return mean(lambda way, run: fmean(entry[f"{_side(way)}/{key}"] for entry in run.measured[part]))

    first, last = slice(0, 1), slice(-3, None)
    return [
        ("reward, first rollout (the same)", mean(lambda way, run: run.log[0]["reward"]), ".2f"),
        ("reward, last tenth of the steps", mean(lambda way, run: _last_tenth(run)), ".2f"),
        ("rows sorted right without noise, before", mean(lambda way, run: run.sorted_before), ".0%"),
        ("rows sorted right without noise, after", mean(lambda way, run: run.sorted_after), ".0%"),
        ("k3 (how far training is from the rollout), at first", mismatch("k3_kl", first), ".2f"),
        ("k3, at the end", mismatch("k3_kl", last), ".2f"),
        (
            "tokens more than twice as likely to one of the two, at the end",
            mismatch("extreme_token_frac", last),
            ".0%",
        ),
    ]


def _side(way: str) -> str:
    return "replay" if way == REPLAY else "live"


def _last_tenth(run: NoisyRun) -> float:
    rewards = [entry["reward"] for entry in run.log]
    return fmean(rewards[-max(1, len(rewards) // 10) :])


def how_large(result: NoisyResult, settings: NoisySettings) -> str:
    """The sentence that says what was made, and what is real."""
    first = [run.measured[0] for runs in result.runs.values() for run in runs]
    changed, k3 = (fmean(entry[f"live/{key}"] for entry in first) for key in ("changed_router_frac", "k3_kl"))
    return HOW_LARGE.format(noise=settings.noise, changed=changed, k3=k3)


def what_it_cost(result: NoisyResult) -> str:
    """Medians of the processor time of a step."""
    each = [f"{median(run.seconds_per_step for run in runs):.2f} s {way}" for way, runs in result.runs.items()]
    return f"Processor time of a step, median: {', '.join(each)}."


def noisy_table(result: NoisyResult) -> Table:
    """The table for a terminal."""
    count = len(next(iter(result.runs.values())))
    table = Table("", *result.runs, title=f"GRPO from the same weights, mean of {count} seed{'s' * (count > 1)}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values, form in noisy_rows(result):
        table.add_row(name, *(format(values[way], form) for way in result.runs))
    return table


def write_noisy(result: NoisyResult, settings: NoisySettings, output: Path) -> None:
    """Write `table.md`, `log.json` and `plot.png`."""
    lines = ["| | " + " | ".join(result.runs) + " |", "|---" * (1 + len(result.runs)) + "|"]
    lines += [
        f"| {name} | " + " | ".join(format(values[way], form) for way in result.runs) + " |"
        for name, values, form in noisy_rows(result)
    ]
    gap, cost = how_large(result, settings), what_it_cost(result)
    (output / "table.md").write_text("\n".join([*lines, "", gap, "", cost, ""]))
    log: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "gap": gap,
        "settings": asdict(settings),
        "table": {name: values for name, values, _ in noisy_rows(result)},
        **asdict(result),
    }
    (output / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    plot_noisy(result, output / "plot.png")


def plot_noisy(result: NoisyResult, path: Path) -> None:
    """Reward and mismatch by step: a thin line a seed, a thick one for their mean."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    reward, mismatch = figure.subplots(1, 2)
    for way, color in zip(result.runs, ("tab:red", "tab:blue"), strict=True):
        runs = result.runs[way]
        steps = [entry["step"] for entry in runs[0].log]
        _draw(reward, steps, [_smooth([entry["reward"] for entry in run.log]) for run in runs], way, color)
        measured = [entry["step"] for entry in runs[0].measured]
        k3 = [[entry[f"{_side(way)}/k3_kl"] for entry in run.measured] for run in runs]
        _draw(mismatch, measured, k3, way, color)
    reward.set(title="reward: share of rows sorted right", xlabel="step", ylim=(0, None))
    mismatch.set(title="k3: how far training is from the rollout", xlabel="step", ylim=(0, None))
    for axes in (reward, mismatch):
        axes.legend(loc="upper left")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _draw(axes: Any, steps: Sequence[float], series: Sequence[Sequence[float]], way: str, color: str) -> None:
    if len(series) > 1:
        for values in series:
            axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.5)
    axes.plot(steps, [fmean(values) for values in zip(*series, strict=True)], color=color, linewidth=2, label=way)


def _smooth(values: Sequence[float], window: int = 20) -> list[float]:
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]
