"""Which model types of the installed Transformers can be replayed, found by attaching to a small model of each.

`python tests/supported_models.py` writes docs/supported_models.md. What a listed type must then pass is in
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

HEAD = """\
# Supported models

Every mixture-of-experts model type of Transformers {version} that generates text, as found by
`python tests/supported_models.py`. A type is supported if a small random model of it passes all of
`tests/routers/test_discovery.py`: its own record replayed gives the same bits, forward and gradients; a foreign record
executes exactly its ids; `generate()` returns routes; gradients with checkpointing of both kinds equal those without.
Attaching repeats the check of each router on the real weights. Types with images or audio were checked on text.

The last column says what `padding="auto"` ([settings](settings.md#padding)) does with the small model: skip padding,
skip it in the experts only, or keep it, for a reason. Attaching decides for a model of yours, whose config may have a
window that this one has not.

Supported: {supported} of {total}; padding is skipped for {skipped}.

| Model type | Class | Router | Padding |
|---|---|---|---|
"""
REFUSED = """
## Refused

Attaching to these raises `UnsupportedRouterError`, with this message:

| Model type | Class | Reason |
|---|---|---|
"""


@dataclass(frozen=True)
class Family:
    """What attaching to a model type found."""

    model_type: str
    model_class: str
    router: str | None
    refusal: str | None
    padding: str = ""


@cache
def examine(model_type: str) -> Family:
    """Attach to a small model of this type."""
    model = build_tiny(model_type)
    name = type(model).__name__
    try:
        replay = RouterReplay(model, padding="auto")
    except UnsupportedRouterError as error:
        return Family(model_type, name, None, str(error))
    router = repr(replay).removeprefix("RouterReplay(").partition(",")[0]
    padding = str(replay.padding).partition(" (")[0]  # without numbers, which another machine rounds otherwise
    replay.remove()
    return Family(model_type, name, router, None, padding)


def listed_types() -> list[str]:
    """The model types of the page as it is, which is that of one Transformers."""
    return re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="ascii"), re.MULTILINE)


def render() -> str:
    """The page."""
    families = [examine(model_type) for model_type in sorted(MODEL_TYPES)]
    supported = [family for family in families if family.refusal is None]
    skipped = sum(family.padding == "skipped" for family in supported)
    head = HEAD.format(
        version=transformers.__version__, supported=len(supported), total=len(families), skipped=skipped
    )
    rows = [f"| `{f.model_type}` | `{f.model_class}` | `{f.router}` | {f.padding} |" for f in supported]
    refused = [f"| `{f.model_type}` | `{f.model_class}` | {f.refusal} |" for f in families if f.refusal is not None]
    return head + "\n".join(rows) + "\n" + REFUSED + "\n".join(refused) + "\n"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(), encoding="ascii")
