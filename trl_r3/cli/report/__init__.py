"""`trl-r3 report`: what a run's traces and log say, as one page and its pictures."""

from __future__ import annotations

from pathlib import Path

from ..bad_input import BadInput
from .page import write
from .pictures import pictures
from .run_data import gather

__all__ = ["main"]


def main(folder: Path, output: Path | None = None) -> int:
    """
    Draw a report.

    Args:
        folder (`Path`):
            The `output_dir` of a run, or a folder with traces.
        output (`Path`, *optional*):
            Folder to write to; `routing_report` inside `folder` by default.

    Returns:
        `int`: Exit status.

    Raises:
        [`BadInput`]: If there is nothing to draw, or nowhere to write.
    """
    try:
        data = gather(folder)
        page = write(data, pictures(data), output or folder / "routing_report")
    except (OSError, ValueError) as error:
        raise BadInput(f"trl-r3 report: {error}") from error
    for each in data.lacking:
        print(f"Not drawn: {each}")
    print(f"Written to {page.resolve()}")
    return 0
