"""CONTRIBUTING.md against the tree: its table of folders is that of the package."""

import re

from documents.code_blocks import ROOT

TABLE = re.compile(r"^\| `(\w+)/` \|", re.MULTILINE)
FILES = re.compile(r"`((?:tests|docs|examples|\.ci)/[\w./]+)`")


def test_the_table_lists_the_folders():
    listed = TABLE.findall((ROOT / "CONTRIBUTING.md").read_text())
    folders = {path.parent.name for path in (ROOT / "trl_r3").glob("*/__init__.py")}
    assert len(listed) == len(set(listed))
    assert set(listed) == folders


def test_files_that_are_named_exist():
    named = FILES.findall((ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 3
    assert not [name for name in named if not (ROOT / name).exists()]
