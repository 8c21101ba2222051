"""The blocks of code of the pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))

FENCE = re.compile(r"^ *(`{3,}|~{3,}) *([\w+-]*)")  # indented ones are inside a list, a tab or a note


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    page: str
    line: int  # of the opening fence, counted from 1
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(page: str, text: str) -> list[Block]:
    """
    The blocks of a page, from top to bottom.

    Raises:
        `ValueError`: If the last block is not closed.
    """
    blocks: list[Block] = []
    opened: tuple[int, str, str] | None = None
    inside: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened, inside = (number, fence[1], fence[2]), []
        elif opened is not None and fence and fence[1].startswith(opened[1]) and not fence[2]:
            blocks.append(Block(page, opened[0], opened[2], dedent("\n".join(inside)) + "\n"))
            opened = None
        elif opened is not None:
            inside.append(line)
    if opened is not None:
        raise ValueError(f"{page}:{opened[0]} opens a block that nothing closes")
    return blocks


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page of this tree."""
    return read_blocks(page, (ROOT / page).read_text(encoding="utf-8"))
