"""Writes the messages of the package into docs/troubleshooting.md: `python tests/error_messages.py`.

Between `<!-- messages: FILES -->` and `<!-- end -->` of that page stand the messages of these files of `trl_r3/`, as
the source has them, with `...` for what is filled in. The text around is written by hand.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
FILLED_IN = "..."
MIN_WORDS = 3  # `sample ...: ...` only passes another message on
_SECTION = re.compile(r"(<!-- messages: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
# What makes an error or a warning, or words the reason of one.
_MAKER = re.compile(r"(\w*Error|BadInput|refusal|refuse|warn)$")
_SPECIAL = re.compile(r"([*_<>\[\]\\])")


def messages(source: str) -> list[str]:
    """The messages of one file, without those that are only passed on, each once, in the order of the source."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    makers = [call for call in calls if _MAKER.match(getattr(call.func, "id", getattr(call.func, "attr", "")))]
    texts = dict.fromkeys("; ".join(_texts(call)) for call in sorted(makers, key=lambda call: call.lineno))
    return [text for text in texts if len(re.findall(r"[A-Za-z]{2,}", text)) >= MIN_WORDS]


def _texts(call: ast.Call) -> list[str]:
    """The texts among the arguments of a call."""
    texts = []
    for argument in call.args:
        parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
        if isinstance(argument, ast.JoinedStr) or isinstance(getattr(argument, "value", None), str):
            texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else FILLED_IN for p in parts))
    return texts


def messages_by_file() -> dict[str, list[str]]:
    """The messages of every file of the package that has some, by its path below `trl_r3/` without `.py`."""
    files = sorted((ROOT / "trl_r3").rglob("*.py"))
    found = {
        path.relative_to(ROOT / "trl_r3").with_suffix("").as_posix(): messages(path.read_text()) for path in files
    }
    return {name: texts for name, texts in found.items() if texts}


def as_item(text: str) -> str:
    """A message as an item of a list: what is code in it stays code, the rest is escaped."""
    pieces = re.split(r"(`[^`]+`)", text)
    return "* " + "".join(p if p.startswith("`") and len(p) > 1 else _SPECIAL.sub(r"\\\1", p) for p in pieces)


def render(page: str) -> str:
    """
    The page with the messages of today.

    Args:
        page (`str`):
            A page with sections that name files.

    Raises:
        `ValueError`: If a file with messages is in no section, or one without messages is.
    """
    by_file = messages_by_file()
    named = [name for _, names, _ in _SECTION.findall(page) for name in names.split()]
    if sorted(named) != sorted(by_file):
        raise ValueError(
            f"the sections name {sorted(set(named) - set(by_file))} without messages, and lack "
            f"{sorted(set(by_file) - set(named))}. Name each file with messages in one section of {PAGE.name}."
        )

    def section(match: re.Match) -> str:
        texts = dict.fromkeys(text for name in match[2].split() for text in by_file[name])
        return match[1] + "\n" + "".join(as_item(text) + "\n" for text in texts) + "\n" + match[3]

    return _SECTION.sub(section, page)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
