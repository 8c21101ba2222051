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


def rows(result: DemoResult) -> list[tuple[str, dict[str, float]]]:
    """
    The table of a demo.

    Returns:
        list of `tuple[str, dict[str, float]]`: What is measured, and its value by run.
    """

    def of_runs(value) -> dict[str, float]:
        return {name: value(name, run) for name, run in result.runs.items()}

    def mean(key: str, other: bool = False) -> dict[str, float]:
        return of_runs(
            lambda name, run: statistics.fmean(
                entry[f"{'replay' if RUNS[name] != other else 'live'}/{key}"] for entry in run.measured
            )
        )

    return [
        ("accuracy before", of_runs(lambda name, run: run.accuracy_before)),
        ("accuracy after", of_runs(lambda name, run: run.accuracy_after)),
        ("reward, first tenth of the steps", of_runs(lambda name, run: _rewards(run)[0])),
        ("reward, last tenth of the steps", of_runs(lambda name, run: _rewards(run)[-1])),
        ("k3_kl", mean("k3_kl")),
        ("k3_kl, same rollouts scored the other way", mean("k3_kl", other=True)),
        ("F(2)", mean("extreme_token_frac")),
        ("F(1.1)", mean("extreme_token_frac_1.1")),
        ("changed routers", mean("changed_router_frac")),
        ("changed tokens", mean("changed_token_frac")),
        ("processor seconds a step", of_runs(lambda name, run: run.seconds_per_step)),
    ]


def _rewards(run: RunResult) -> list[float]:
    """Mean reward of each tenth of the steps."""
    size = max(1, len(run.log) // 10)
    rewards = [entry["reward"] for entry in run.log]
    return [statistics.fmean(rewards[start : start + size]) for start in range(0, len(rewards), size)]


def _formatted(label: str, value: float) -> str:
    if label.startswith("k3"):
        return f"{value:.2e}"
    return f"{value:.3f}" if label.startswith("processor") else f"{value:.2%}"


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
    (output / "table.md").write_text("\n".join([*lines, "", GAP, ""]))
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
    mismatch.set(title="rollout against training", xlabel="step", ylabel="k3_kl", yscale="log")
    reward.set(title="reward", xlabel="step", ylabel="share of right answers, running mean", ylim=(0, 1))
    for axes in (mismatch, reward):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _smooth(run: RunResult, window: int = 10) -> list[float]:
    rewards = [entry["reward"] for entry in run.log]
    return [statistics.fmean(rewards[max(0, end - window) : end]) for end in range(1, len(rewards) + 1)]
