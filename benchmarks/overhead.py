"""`python -m benchmarks`: what replay costs on a CPU, and what it keeps."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .alarm import alarm_cost
from .costs import generation_cost, storage, training_cost
from .fidelity import mismatch, own_record
from .launches import launches
from .mask_fidelity import mask_mismatch
from .masks import mask_cost
from .records import record_making
from .setup import BenchSettings, Finding, in_turn
from .trace import trace_cost

__all__ = ["BenchSettings", "Finding", "main"]

PARTS: tuple[Callable[[BenchSettings], list[Finding]], ...] = (
    training_cost,
    generation_cost,
    launches,
    alarm_cost,
    trace_cost,
    mask_cost,
    storage,
    mismatch,
    mask_mismatch,
    own_record,
    record_making,
)


def main(output: Path | None, settings: BenchSettings | None = None, threads: int = 1) -> list[Finding]:
    """
    Measure everything, print a table, and write it.

    Args:
        output (`Path`, *optional*):
            JSON file.
        settings ([`BenchSettings`], *optional*):
            Sizes.
        threads (`int`, *optional*, defaults to `1`):
            Threads of PyTorch. With one, processor time is the work done, however busy the machine is.

    Returns:
        list of [`Finding`].
    """
    settings = settings or BenchSettings()
    console = Console()
    with threads_of(threads):
        findings = in_turn({part.__name__.replace("_", " "): partial(part, settings) for part in PARTS})
    console.print(table(findings))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        log: dict[str, Any] = {**environment(), "threads": threads, "settings": asdict(settings)}
        log["findings"] = [{**asdict(finding), "met": finding.met} for finding in findings]
        output.write_text(json.dumps(log, indent=1) + "\n")
        console.print(f"Written to {output.resolve()}", soft_wrap=True)
    return findings


def environment() -> dict[str, Any]:
    """When and where something was measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


@contextmanager
def threads_of(count: int = 1) -> Iterator[None]:
    """PyTorch with so many threads. With one, processor time is the work done, however busy the machine is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def table(findings: list[Finding]) -> Table:
    """What was measured, and whether it is within its targets."""
    rows = Table("", "measured", "target", "met")
    for finding in findings:
        target = "" if finding.target is None else f"<= {finding.target:g}"
        met = "" if finding.met is None else "yes" if finding.met else "no"
        rows.add_row(finding.what, f"{finding.value:.4g}", target, met)
    return rows
