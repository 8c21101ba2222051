"""The table, the plot and the log of a demo."""

from __future__ import annotations

import json
import platform
import statistics
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from .low_precision import GAP
from .run import RUNS, DemoResult, RunResult
from .settings import DemoSettings

_MISMATCH = {
    "k3_kl": "k3 (how far training is from the rollout)",
    "extreme_token_frac": "tokens more than twice as likely to one of the two",
    "extreme_token_frac_1.1": "tokens more than 1.1 times as likely to one",
}
_WAYS = {"live": "scored live", "replay": "same rollouts with their experts"}


def rows(result: DemoResult) -> list[tuple[str, dict[str, float]]]:
    """
    The table of a demo.

    Returns:
        list of `tuple[str, dict[str, float]]`: What is measured, and its value by run.
    """

    def of_runs(value) -> dict[str, float]:
        return {name: value(name, run) for name, run in result.runs.items()}

    def mean(key: str) -> dict[str, float]:
        return of_runs(lambda name, run: statistics.fmean(entry[key] for entry in run.measured))

    return [
        ("sums right, greedy, before", of_runs(lambda name, run: run.accuracy_before)),
        ("sums right, greedy, after", of_runs(lambda name, run: run.accuracy_after)),
        ("reward, first tenth of the steps", of_runs(lambda name, run: _rewards(run)[0])),
        ("reward, last tenth of the steps", of_runs(lambda name, run: _rewards(run)[-1])),
        *((f"{what}, {how}", mean(f"{way}/{key}")) for key, what in _MISMATCH.items() for way, how in _WAYS.items()),
        ("routers where live routing chooses other experts", mean("live/changed_router_frac")),
        ("tokens with such a router", mean("live/changed_token_frac")),
    ]


def what_steps_took(result: DemoResult) -> str:
    """Medians of the processor time of a step."""
    each = [f"{run.seconds_per_step:.3f} s {name}" for name, run in result.runs.items()]
    return f"Processor time of a step, median: {', '.join(each)}."


def _rewards(run: RunResult) -> list[float]:
    """Mean reward of each tenth of the steps."""
    size = max(1, len(run.log) // 10)
    rewards = [entry["reward"] for entry in run.log]
    return [statistics.fmean(rewards[start : start + size]) for start in range(0, len(rewards), size)]


def _formatted(label: str, value: float) -> str:
    return f"{value:.2e}" if label.startswith("k3") else f"{value:.2%}"


def rich_table(result: DemoResult) -> Table:
    """The table for a terminal."""
    table = Table("", *result.runs, title="GRPO from the same weights")
    for column in table.columns[1:]:
        column.justify = "right"
    for label, values in rows(result):
        table.add_row(label, *(_formatted(label, values[run]) for run in result.runs))
    return table


def write(result: DemoResult, model: str, settings: DemoSettings, output: Path) -> None:
    """Write `table.md`, `log.json` and `plot.png`."""
    lines = ["| | " + " | ".join(result.runs) + " |", "|---" * (1 + len(result.runs)) + "|"]
    lines += [
        f"| {label} | " + " | ".join(_formatted(label, values[run]) for run in result.runs) + " |"
        for label, values in rows(result)
    ]
    (output / "table.md").write_text("\n".join([*lines, "", GAP, "", what_steps_took(result), ""]))
    log: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "model": model,
        "gap": GAP,
        "settings": asdict(settings),
        "table": dict(rows(result)),
        **asdict(result),
    }
    (output / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    plot(result, output / "plot.png")


def plot(result: DemoResult, path: Path) -> None:
    """Mismatch and reward by step."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    mismatch, reward = figure.subplots(1, 2)
    for name, run in result.runs.items():
        steps = [entry["step"] for entry in run.measured]
        key = f"{'replay' if RUNS[name] else 'live'}/k3_kl"
        mismatch.plot(steps, [entry[key] for entry in run.measured], marker=".", label=name)
        reward.plot([entry["step"] for entry in run.log], _smooth(run), label=name)
    mismatch.set(title="k3: how far training is from the rollout", xlabel="step", yscale="log")
    reward.set(title="reward: share of right sums, running mean", xlabel="step", ylim=(0, 1))
    for axes in (mismatch, reward):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _smooth(run: RunResult, window: int = 10) -> list[float]:
    rewards = [entry["reward"] for entry in run.log]
    return [statistics.fmean(rewards[max(0, end - window) : end]) for end in range(1, len(rewards) + 1)]
