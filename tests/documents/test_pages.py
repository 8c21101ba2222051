"""What the pages hold as a whole: how long they are, and whether their generated parts are those of today."""

import dataclasses
import re

from documents import settings_table
from documents.code_blocks import ROOT

from trl_r3 import R3GRPOConfig, R3IWOPDConfig

MOST_OF_README, MOST_OF_PAGES = 900, 14_000
GENERATED = re.compile(r"<!-- [\w ]*: generated -->.*?<!-- end of [\w ]* -->", re.DOTALL)  # as long as what was run


def words(text: str) -> int:
    """Without the bars of tables."""
    return len([word for word in GENERATED.sub("", text).split() if re.search(r"\w", word)])


def test_the_readme_is_read_at_a_sitting():
    assert words("| a | <!-- settings: generated --> b c <!-- end of settings --> d e |\n|---|") == 3
    assert words((ROOT / "README.md").read_text()) <= MOST_OF_README


def test_the_pages_are_read_in_an_hour():
    pages = {path.name: words(path.read_text()) for path in (ROOT / "docs").glob("*.md") if path.name != "api.md"}
    assert len(pages) > 10
    assert sum(pages.values()) <= MOST_OF_PAGES, f"shorten, or move tables to benchmarks/: {pages}"


def test_every_page_is_on_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    named = re.findall(r"(\w+\.md)", navigation)
    assert sorted(named) == sorted(["index.md", *(path.name for path in (ROOT / "docs").glob("*.md"))])


def test_the_settings_are_those_of_today():
    page = settings_table.PAGE.read_text(encoding="ascii")
    assert settings_table.render(page) == page, "run python tests/documents/settings_table.py"
    for config in (R3GRPOConfig, R3IWOPDConfig):
        ours = {each.name for each in dataclasses.fields(config) if each.name.startswith(("routing_", "use_routing"))}
        assert len(ours) > 9
        assert all(f"\n| `{name}` |" in page for name in ours)
