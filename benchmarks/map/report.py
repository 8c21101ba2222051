"""Redraw the map from the finished runs: `python -m benchmarks.map.report`, from the root of the repository."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from .page import blocks, filled
from .plot import plot
from .results import read
from .run import FOLDER

PAGE = FOLDER / "README.md"


def main() -> None:
    """The command."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER / "runs.jsonl", help="lines of finished runs")
    parser.add_argument("--page", type=Path, default=PAGE, help="page whose generated parts are replaced")
    args = parser.parse_args()
    lines = read(args.results)
    args.page.write_text(filled(args.page.read_text(encoding="ascii"), blocks(lines)), encoding="ascii")
    plot(lines, args.page.with_name("map.png"))


if __name__ == "__main__":
    main()
