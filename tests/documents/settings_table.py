"""Fields of the configs, from their `help`: `python tests/documents/settings_table.py` puts them into docs/api.md."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from trl.experimental.async_grpo import AsyncGRPOConfig

from trl_r3 import R3AsyncGRPOConfig
from trl_r3.trainers.shift_config import RouterShiftConfigMixin

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
_NAME = re.compile(r"\b(?:routing_replay|sampling)(?:_[a-z_]+|/[a-z_/*]+)|\btrl-r3 \w+(?: --\w+)?")
_TABLE = re.compile(r"(<!-- settings: generated -->\n).*(\n<!-- end of settings -->)", re.DOTALL)


def settings() -> list[dataclasses.Field]:
    """Fields of all configs, that of GRPO and GMPO, then those of asynchronous GRPO alone."""
    shared = dataclasses.fields(RouterShiftConfigMixin)
    known = {each.name for each in (*shared, *dataclasses.fields(AsyncGRPOConfig))}
    return [*shared, *(each for each in dataclasses.fields(R3AsyncGRPOConfig) if each.name not in known)]


def as_row(setting: dataclasses.Field) -> str:
    """Of the table: what is code in the help of a command line becomes code."""
    text = _NAME.sub(lambda name: f"`{name[0]}`", setting.metadata["help"])
    text = re.sub(r"'(\w+)'", r'`"\1"`', text)
    default = repr(setting.default).replace("'", '"')
    return f"| `{setting.name}` | `{default}` | {text} |"


def render(page: str) -> str:
    """The page with the fields of today."""
    rows = "\n".join(["| field | default | |", "|---|---|---|", *map(as_row, settings())])
    return _TABLE.sub(lambda marks: f"{marks[1]}\n{rows}\n{marks[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="ascii")), encoding="ascii")
