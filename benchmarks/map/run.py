"""Run what is missing of the map: `python -m benchmarks.map.run`, from the root of the repository."""

from __future__ import annotations

import json
import multiprocessing
import os
from argparse import ArgumentParser
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .cells import Cell, Sizes
from .grid import runs
from .results import read

FOLDER = Path(__file__).parent


def one_run(cell: Cell, seed: int, starts: Path) -> dict:
    """A run in a process of its own."""
    from .training import run  # TRL takes seconds to import, and the parent does without

    return run(cell, seed, Sizes(), starts)


def run_missing(results: Path, starts: Path, workers: int, full: bool) -> None:
    """
    Run the cells and seeds that have no line yet. Each finished run is written at once; stop and start at will.

    Args:
        results (`Path`):
            File of JSON lines, made if it does not exist.
        starts (`Path`):
            Folder of the warmed-up models, made if it does not exist.
        workers (`int`):
            Processes, of one thread each.
        full (`bool`):
            Whether to run every arm in every setting.
    """
    done = {(Cell.of(line), line["seed"]) for line in read(results)}
    wanted = list(runs(full))
    missing = [each for each in wanted if each not in done]
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    described = TextColumn("{task.description}")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to be started
    context = multiprocessing.get_context("spawn")
    with Progress(*columns, described) as progress, ProcessPoolExecutor(workers, mp_context=context) as pool:
        task = progress.add_task("", total=len(wanted), completed=len(wanted) - len(missing))
        futures = {pool.submit(one_run, cell, seed, starts): cell for cell, seed in missing}
        try:
            for future in as_completed(futures):
                with results.open("a") as file:
                    file.write(json.dumps(future.result()) + "\n")
                setting = futures[future].setting
                text = f"{setting.gate}, {setting.rollout}, {setting.updates}, {setting.learning_rate}"
                progress.update(task, advance=1, description=text)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main() -> None:
    """The command."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, one thread each")
    parser.add_argument("--results", type=Path, default=FOLDER / "runs.jsonl", help="lines of finished runs")
    parser.add_argument("--starts", type=Path, default=FOLDER / "starts", help="folder of the warmed-up models")
    parser.add_argument("--full", action="store_true", help="every arm in every setting: a night")
    args = parser.parse_args()
    run_missing(args.results, args.starts, args.workers, args.full)


if __name__ == "__main__":
    main()
