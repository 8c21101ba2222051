"""`trl-r3 report`: whether a run is healthy, by its traces and log, on one page with pictures; or two runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from ..bad_input import BadInput
from .differences import last_means
from .page import write
from .run_data import gather, without_replay
from .run_verdict import judge_run

__all__ = ["main"]


def main(folders: Sequence[Path], output: Path | None = None, as_json: bool = False) -> int:
    """
    Judge one run or two, and draw them.

    Args:
        folders (sequence of `Path`):
            The `output_dir` of each run, or a folder with its traces.
        output (`Path`, *optional*):
            Folder to write to; by default `routing_report` inside the first, `routing_comparison` of two.
        as_json (`bool`, *optional*, defaults to `False`):
            Whether to print the verdict and its numbers, and draw nothing.

    Returns:
        `int`: Exit status: 0 if each run with replay is healthy, 1 if one is not.

    Raises:
        [`BadInput`]: If there is nothing to judge, or nowhere to write.
    """
    try:
        found = [gather(folder) for folder in folders]
        if not any(data.replays for data in found):
            raise without_replay(folders[0])
        runs = [(data, judge_run(data)) for data in found]
        healthy = all(verdict.is_healthy is not False for _, verdict in runs)
        if as_json:
            keys = ("folder", "last", "lacking")
            facts = [
                dict(zip(keys, (str(data.folder), _numbers(last_means(data)), data.lacking), strict=True))
                for data in found
            ]
            said = [{**fact, **verdict.as_dict()} for fact, (_, verdict) in zip(facts, runs, strict=True)]
            print(json.dumps({"healthy": healthy, "runs": said}, indent=1))
            return int(not healthy)
        name = "routing_comparison" if len(runs) > 1 else "routing_report"
        page = write(runs, output or folders[0] / name)
    except (OSError, ValueError) as error:
        raise BadInput(f"trl-r3 report: {error}") from error
    for data, verdict in runs:
        head = f"{data.folder}: " if len(runs) > 1 else ""
        print(f"{head}{verdict.headline}", *verdict.unhealthy, *filter(None, [verdict.cut]), sep="\n  ")
        for each in data.lacking:
            print(f"Not drawn: {each}")
    print(f"Written to {page.resolve()}")
    return int(not healthy)


def _numbers(means: dict[str, float]) -> dict[str, float | None]:
    """For JSON, which has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in means.items()}
