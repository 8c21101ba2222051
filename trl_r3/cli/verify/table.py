"""The findings as a table that a person reads, or as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.table import Table

from .findings import Finding

_STYLES = {"right": "green", "wrong": "bold red", "not judged": "dim"}


@dataclass
class Layer:
    """
    What was seen of one MoE layer.

    Args:
        layer (`int`):
            Index of the decoder layer.
        other_ids (`int`, *optional*):
            Recorded rows that executed other ids; `None` where nothing shows which ids ran.
        agreement, contrast (`float`, *optional*):
            Of the alarm; NaN where there is nothing to tell apart.
        max_over_mean, entropy (`float`), dead_experts (`int`):
            Of the load that the record puts on the experts, as in [`ExpertLoad`].
    """

    layer: int
    other_ids: int | None
    agreement: float | None
    contrast: float | None
    max_over_mean: float
    dead_experts: int
    entropy: float


@dataclass
class Report:
    """
    What a verification found.

    Args:
        origin, architecture (`str`):
            Which weights, of which class.
        source (`str`):
            Where the rollout comes from.
        temperature (`float`):
            Of the rollout.
        findings (list of [`Finding`]):
            The rows of the table.
        layers (list of [`Layer`]):
            By ascending decoder layer.
        process, num_processes (`int`, *optional*, defaults to 0 and 1):
            Whose findings these are, of how many processes.
        failed (list of `int`, *optional*):
            Processes in which something is wrong, of several.
        sharding (`str`, *optional*):
            What shards the weights.
    """

    origin: str
    architecture: str
    source: str
    temperature: float
    findings: list[Finding]
    layers: list[Layer]
    process: int = 0
    num_processes: int = 1
    failed: list[int] = field(default_factory=list)
    sharding: str | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return all(finding.status != "wrong" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers that do not exist are `None`."""
        layers = [{key: _number(value) for key, value in asdict(layer).items()} for layer in self.layers]
        return {
            "passed": self.passed,
            "model": self.origin,
            "architecture": self.architecture,
            "rollout": self.source,
            "temperature": self.temperature,
            "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
            "process": self.process,
            "num_processes": self.num_processes,
            "failed_processes": self.failed,
            "sharding": self.sharding,
            "findings": [asdict(finding) for finding in self.findings],
            "layers": layers,
        }


def print_report(report: Report) -> None:
    """Print the tables, and for each failure its cause and remedy."""
    console = Console(soft_wrap=True)
    console.print(f"{report.architecture}, {report.origin}", markup=False)
    console.print(f"rollout by {report.source}, temperature {report.temperature:g}", markup=False)
    if report.num_processes > 1:
        weights = "whole in each" if report.sharding is None else f"sharded by {report.sharding}"
        console.print(f"rank {report.process} of {report.num_processes} processes, weights {weights}", markup=False)
    table = Table("", "", "seen")
    for finding in report.findings:
        table.add_row(finding.what, f"[{_STYLES[finding.status]}]{finding.status}[/]", finding.seen)
    console.print(table)
    layers = Table(
        "layer", "rows with other ids", "agreement", "contrast", "busiest expert", "dead experts", "entropy of load"
    )
    for layer in report.layers:
        other = "not seen" if layer.other_ids is None else str(layer.other_ids)
        load = (_text(layer.max_over_mean), str(layer.dead_experts), _text(layer.entropy))
        layers.add_row(str(layer.layer), other, _text(layer.agreement), _text(layer.contrast), *load)
    console.print(layers)
    for finding in report.findings:
        if finding.status == "wrong":
            console.print(f"{finding.what}: {finding.cause}.", style="bold red", markup=False)
            console.print(f"  What to do: {finding.remedy}.", markup=False)
    where = f" in all {report.num_processes} processes" if report.num_processes > 1 else ""
    if report.passed:
        console.print(f"Every row that could be judged is right{where}.")
    else:
        where = f" on rank {', '.join(map(str, report.failed))}" if report.failed else ""
        console.print(f"Something is wrong{where}, see above.")


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"
