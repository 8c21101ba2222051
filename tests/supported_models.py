"""Which model types of the installed Transformers can be replayed, found by attaching to a small model of each.

`python tests/supported_models.py` writes them into docs/supported_models.md. What a listed type must then pass is in
test_discovery.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import transformers
from model_zoo import MOE_MODEL_TYPES, MULTIMODAL_MOE_MODEL_TYPES, UNBUILDABLE, build_tiny

from trl_r3 import RouterReplay, UnsupportedRouterError

PAGE = Path(__file__).parents[1] / "docs" / "supported_models.md"
MODEL_TYPES = (*MOE_MODEL_TYPES, *MULTIMODAL_MOE_MODEL_TYPES, *UNBUILDABLE)

_TYPES = re.compile(r"(<!-- types: generated -->\n).*(\n<!-- end of types -->)", re.DOTALL)


@dataclass(frozen=True)
class Family:
    """What attaching to a model type found."""

    model_type: str
    refusal: str | None
    padding: str = ""


@cache
def examine(model_type: str) -> Family:
    """Attach to a small model of this type."""
    model = build_tiny(model_type)
    try:
        replay = RouterReplay(model, padding="auto")
    except UnsupportedRouterError as error:
        return Family(model_type, str(error))
    padding = str(replay.padding).partition(" (")[0]  # without numbers, which another machine rounds otherwise
    replay.remove()
    return Family(model_type, None, padding)


def listed_types(padding: str = ".*") -> list[str]:
    """
    The model types of the page as it is, which is that of one Transformers.

    Args:
        padding (`str`, *optional*):
            A pattern for what becomes of theirs, such as "skipped".
    """
    (types,) = _TYPES.finditer(PAGE.read_text(encoding="ascii"))
    lines = re.findall(rf"^\| {padding} \| (`.+`) \|$", types[0].partition("### Refused")[0], re.MULTILINE)
    return [model_type for line in lines for model_type in re.findall(r"`(\w+)`", line)]


def render(page: str) -> str:
    """The page with what attaching finds today: types by what becomes of their padding, and what is refused."""
    families = [examine(model_type) for model_type in sorted(MODEL_TYPES)]
    supported = [family for family in families if family.refusal is None]
    by_padding: dict[str, list[str]] = {}
    for family in sorted(supported, key=lambda family: ("skipped", "skipped by", "kept").index(_kind(family))):
        by_padding.setdefault(family.padding, []).append(f"`{family.model_type}`")
    lines = [
        f"Of the {len(families)} mixture-of-experts model types of Transformers {transformers.__version__} that "
        f"generate text, {len(supported)} are supported;",
        f"padding is skipped for {len(by_padding['skipped'])}.",
        "",
        "| padding | model types |",
        "|---|---|",
        *(f"| {padding} | {', '.join(types)} |" for padding, types in by_padding.items()),
        "",
        "### Refused",
        "",
        "Attaching to these raises `UnsupportedRouterError`, with this message:",
        "",
        "| model type | reason |",
        "|---|---|",
        *(f"| `{family.model_type}` | {family.refusal} |" for family in families if family.refusal is not None),
    ]
    return _TYPES.sub(lambda marks: "\n".join([marks[1], *lines, marks[2]]), page)


def _kind(family: Family) -> str:
    return "skipped" if family.padding == "skipped" else "skipped by" if "skipped" in family.padding else "kept"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PAGE.write_text(render(PAGE.read_text(encoding="ascii")), encoding="ascii")
