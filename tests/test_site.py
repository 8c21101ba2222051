"""The pages of the docs site: links, messages, and docstrings as Markdown. CI builds it (`mkdocs build --strict`)."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable
from types import SimpleNamespace

import error_messages
import pytest
import torch

from trl_r3 import RoutingLayout, decode_sglang, decode_vllm_http, load_trace, masked_topk_gating
from trl_r3.records.checks import check_rows
from trl_r3.records.record import select_moe_layers

DOCS = error_messages.ROOT / "docs"
PAGE = error_messages.PAGE.read_text()
LAYOUT = RoutingLayout(moe_layers=(1, 2), num_decoder_layers=4, num_experts=8, top_k=2)
MIN_DISTINCTIVE = 16  # characters of a phrase that is worth a search
_LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(?:#[^)]*)?\)")


def unescaped(text: str) -> str:
    return re.sub(r"\\([*_<>\[\]\\])", r"\1", text)


def is_on(page: str, message: str) -> bool:
    """Whether an item of the page says a message, numbers and names aside, in more than a few words."""
    items = [unescaped(line[2:]) for line in page.splitlines() if line.startswith("* ")]
    return any(
        len(item.replace("...", "")) > 2 * MIN_DISTINCTIVE
        and re.fullmatch(re.escape(item).replace(re.escape("..."), ".*"), message, re.DOTALL)
        for item in items
    )


def test_the_page_has_the_messages_of_today():
    assert error_messages.render(PAGE) == PAGE, "run `python tests/error_messages.py`"


def test_every_phrase_of_a_raise_is_on_the_page():
    """Found without the rules by which the page is made: the longest phrase of whatever is raised."""
    text, missing, seen = unescaped(PAGE), [], 0
    for path in sorted((error_messages.ROOT / "trl_r3").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                phrases = [
                    part.value
                    for part in ast.walk(node.exc)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                ]
                longest = max(phrases, key=len, default="").strip()
                if len(longest) >= MIN_DISTINCTIVE:
                    seen += 1
                    missing += [f"{path.name}:{node.lineno}: {longest}"] * (longest not in text)
    assert seen > 150
    assert not missing


def raised_by_the_gate():
    masked_topk_gating(torch.zeros(3, 4), top_k=5)


def raised_by_a_record():
    check_rows(torch.tensor([[[0, 0], [1, 2]]]), LAYOUT, sample=3)


def raised_by_a_wrong_layout():
    select_moe_layers(torch.zeros(1, 5, 3, 2, dtype=torch.long), LAYOUT)


def raised_by_no_trace():
    load_trace("no/such/trace.safetensors")


def raised_by_a_server_without_routes():
    decode_vllm_http(None)


def raised_by_a_short_payload():
    decode_sglang("AAAA", num_rows=2, num_decoder_layers=4, top_k=2)


@pytest.mark.parametrize(
    "fail",
    [
        raised_by_the_gate,
        raised_by_a_record,
        raised_by_a_wrong_layout,
        raised_by_no_trace,
        raised_by_a_server_without_routes,
        raised_by_a_short_payload,
    ],
)
def test_what_is_really_raised_is_findable(fail: Callable[[], None]):
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError)) as caught:
        fail()
    message = str(caught.value)
    assert is_on(PAGE, message)
    assert not is_on(PAGE, " ".join(reversed(message.split())))
    assert not is_on("* ...: ...\n* sample ...: ...\n", message)  # what says anything finds nothing


def test_a_file_without_a_section_is_refused():
    with pytest.raises(ValueError, match="lack .*gating/contract"):
        error_messages.render(PAGE.replace("gating/contract ", ""))


def test_links_lead_to_files():
    """As a code host follows them; on the site, those that leave docs/ are rewritten."""
    links = [(page, link[1]) for page in sorted(DOCS.glob("*.md")) for link in _LINK.finditer(page.read_text())]
    assert len(links) > 50
    # a page of its own branch may be named in the navigation, never linked
    assert not [f"{page.name}: {target}" for page, target in links if not (page.parent / target).exists()]


def loaded(name: str):
    """A module of the site, which is no part of the package."""
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
    page = SimpleNamespace(file=SimpleNamespace(src_uri="quick_start.md"))
    config = SimpleNamespace(extra={"source_url": source_url})
    written = "[a](jobs.md#b), [the recipes](../examples/recipes), [README](../README.md)"
    assert loaded("links").on_page_markdown(written, page, config, files=[]) == expected


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
