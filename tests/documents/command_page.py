"""The help of every command, as it is printed: `python tests/documents/command_page.py` writes docs/commands.md."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from trl_r3.cli.command import build_parser

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
TERMINAL = {"COLUMNS": "100", "NO_COLOR": "1"}

HEAD = """\
# Commands

What `trl-r3 --help` and the help of each subcommand print in a terminal of {columns} columns. Written by
`python tests/documents/command_page.py`; a test says when it is stale.
"""


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its subcommands, to any depth."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def render() -> str:
    """The page."""
    with mock.patch.dict(os.environ, TERMINAL):
        helps = [(parser.prog, parser.format_help().rstrip()) for parser in parsers(build_parser())]
    parts = [f"\n## {program}\n\n```text\n{text}\n```\n" for program, text in helps]
    return HEAD.format(columns=TERMINAL["COLUMNS"]) + "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="ascii")
