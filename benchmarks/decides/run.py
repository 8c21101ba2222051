"""Run what is missing, one run after the other, and keep each as a line as soon as it is finished."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.map.results import read

from .cells import Cell, Setting, Sizes
from .grid import LOUD, runs
from .report import redraw

FOLDER = Path(__file__).parent


def run_missing(results: Path, starts: Path, wanted: Iterable[tuple[Cell, int]], sizes: Sizes) -> None:
    """
    Run the cells and seeds that have no line yet. Stop and start at will.

    Args:
        results (`Path`):
            File of JSON lines, made if it does not exist.
        starts (`Path`):
            Folder of the warmed-up models, made if it does not exist.
        wanted (iterable of `tuple[Cell, int]`):
            Cells and seeds, in their order.
        sizes ([`Sizes`]):
            Of the runs.
    """
    from .training import run  # TRL takes seconds to import

    done = {(Cell.of(line), line["seed"]) for line in read(results)}
    wanted = list(wanted)
    missing = [each for each in wanted if each not in done]
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(wanted), completed=len(wanted) - len(missing))
        for cell, seed in missing:
            name = f"{cell.setting.rollout}, top-{cell.setting.top_k}, {cell.arm}, seed {seed}"
            progress.update(task, description=name)
            line = run(cell, seed, sizes, starts)
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            last = line["reward"][-3:]
            progress.console.print(f"{name}: reward {sum(last) / len(last):.2f}, {line['seconds']:.0f} s")
            progress.advance(task)


def main(smoke: bool, only_redraw: bool) -> None:
    """
    Run what is missing of the study and redraw its page, or see that everything runs.

    Args:
        smoke (`bool`):
            Whether to do a few steps live and with replay, and keep nothing.
        only_redraw (`bool`):
            Whether to run nothing.
    """
    results = FOLDER / "runs.jsonl"
    if smoke:
        few = Sizes(start_share=0.0, prompts=4, generations=4, average_over=2, measure_every=2, held_out=20)
        with tempfile.TemporaryDirectory() as scratch:
            cells = [(Cell(Setting(LOUD, steps=4), arm), 0) for arm in ("live", "R3")]
            run_missing(Path(scratch) / "runs.jsonl", Path(scratch) / "starts", cells, few)
        return
    if not only_redraw:
        run_missing(results, FOLDER / "starts", runs(), Sizes())
    redraw(results)
