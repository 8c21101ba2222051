"""Checkpoints whose sizes the repository holds: this script writes docs/checkpoints.md."""

import json
from pathlib import Path

from transformers import AutoConfig

from trl_r3.cli.plan import Job, read_model

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "checkpoints.md"
CONFIGS = sorted((ROOT / "examples" / "recipes" / "configs").glob("*/config.json"))

HEAD = """\
# Supported models by checkpoint

Checkpoints with a config in `examples/recipes/configs`, by `python tests/documents/checkpoint_page.py`. None is the
file of the Hub: their sources are named below. The type of a model decides whether it is supported, and
[all types](supported_models.md) are listed. None of these has been run at full size.

| Checkpoint | Type | MoE layers | E | K |
|---|---|---|---|---|
"""


def render() -> str:
    """The page."""
    rows, sources = [], []
    for path in CONFIGS:
        facts = read_model(str(path.parent), Job(prompts=1))
        layout, name = facts.layout, path.parent.name
        config = AutoConfig.from_pretrained(path.parent)
        numbers = f"{len(layout.moe_layers)} | {layout.num_experts} | {layout.top_k}"
        rows.append(f"| {name} | `{config.model_type}` | {numbers} |\n")
        sources.append(f"* {name}: {json.loads(path.read_text())['_source']}\n")
    return HEAD + "".join(rows) + "\n## Sources\n\n" + "".join(sources)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="ascii")
