"""The docs site: links, and docstrings as Markdown. CI builds it (`mkdocs build --strict`)."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *sorted(DOCS.glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
_LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(?:#([^)]*))?\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """As code hosts and the site make them of headings."""
    headings = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in _HEADING.findall(page.read_text()))
    return {re.sub(r"\s", "-", heading) for heading in headings}


def test_links_lead_to_files():
    """As a code host follows them; on the site, those that leave docs/ are rewritten."""
    links = [(page, link[1], link[2]) for page in PAGES for link in _LINK.finditer(page.read_text())]
    assert len(links) > 50
    # a page of its own branch may be named in the navigation, never linked
    assert not [f"{page.name}: {target}" for page, target, _ in links if not (page.parent / target).exists()]
    pages = [(page, page.parent / target, anchor) for page, target, anchor in links if anchor]
    assert len(pages) > 20
    assert not [f"{page.name}: {to.name}#{anchor}" for page, to, anchor in pages if anchor not in anchors(to)]


def loaded(name: str):
    """A module of the site, which is no part of the package."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location(name, DOCS / "_site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("source_url", "expected"),
    [
        ("", "[a](jobs.md#b), the recipes (`examples/recipes`), `README.md`"),
        (
            "https://host/",
            "[a](jobs.md#b), [the recipes](https://host/examples/recipes), [README](https://host/README.md)",
        ),
    ],
)
def test_links_out_of_the_docs_are_rewritten(source_url: str, expected: str):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="watching.md"))
    config = SimpleNamespace(extra={"source_url": source_url})
    written = "[a](jobs.md#b), [the recipes](../examples/recipes), [README](../README.md)"
    assert loaded("links").on_page_markdown(written, page, config, files=[]) == expected


def test_the_readme_is_the_first_page():
    readme = (
        "[a](docs/jobs.md#b) [![p](docs/p.png)](docs/p.md) [c](examples/agent) [d](https://a/docs/e.md) [f](LICENSE)"
    )
    page = "[a](jobs.md#b) [![p](p.png)](p.md) [c](../examples/agent) [d](https://a/docs/e.md) [f](../LICENSE)"
    assert loaded("links").as_page(readme) == page


DOCSTRING = """
Says what it does.

Args:
    ids (`torch.Tensor` of shape `(N, K)`, *optional*, defaults to `None`):
        First line,
        second line of [`~trl.GRPOConfig`].
    first, second (`int`):
        Two.
    kwargs:
        The rest.

Returns:
    `torch.Tensor` of shape `(N,)`: What it is.

Raises:
    `ValueError`: If it is wrong.

Yields:
    What has no name, in a sentence
    of two lines.

Example:

```python
>>> 1
```
"""
MARKDOWN = """Says what it does.


**Args**

* `ids` (`torch.Tensor` of shape `(N, K)`, *optional*, defaults to `None`):
    First line,
    second line of `GRPOConfig`.
* `first, second` (`int`):
    Two.
* `kwargs`:
    The rest.


**Returns**

* `torch.Tensor` of shape `(N,)`: What it is.


**Raises**

* `ValueError`: If it is wrong.


**Yields**

What has no name, in a sentence
of two lines.


**Example**


```python
>>> 1
```"""


def test_docstrings_become_lists():
    pytest.importorskip("griffe")
    assert loaded("docstrings").as_markdown(DOCSTRING) == MARKDOWN
