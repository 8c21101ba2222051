"""Redraw the page from the finished runs."""

from __future__ import annotations

from pathlib import Path

from benchmarks.map.page import filled
from benchmarks.map.results import read

from .page import blocks
from .plot import plot
from .results import by_cell

PAGE = Path(__file__).parents[2] / "docs" / "when_it_helps.md"


def redraw(results: Path, page: Path = PAGE) -> None:
    """
    Replace the generated parts of a page, and its picture.

    Args:
        results (`Path`):
            Lines of finished runs.
        page (`Path`, *optional*):
            The page; the picture lies beside it, by the same name.
    """
    lines = read(results)
    page.write_text(filled(page.read_text(encoding="ascii"), blocks(lines)), encoding="ascii")
    plot(by_cell(lines), page.with_suffix(".png"))
