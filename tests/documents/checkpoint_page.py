"""Checkpoints whose sizes the repository holds: this script writes their table into docs/supported_models.md.

Legend: E experts, K experts per token.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from trl_r3 import RouterReplay, UnsupportedRouterError
from trl_r3.cli.twin import narrow_twin
from trl_r3.routers.gated import GatedRouter, GateFormula

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "supported_models.md"
VLLM = json.loads((Path(__file__).parent / "vllm_classes.json").read_text())
CONFIGS = sorted((ROOT / "examples" / "recipes" / "configs").glob("*/config.json"))

_TABLE = re.compile(r"(<!-- checkpoints: generated -->\n).*(\n<!-- end of checkpoints -->)", re.DOTALL)
HEAD = """
Found with Transformers {version} and, on a CPU, with small random models of each type, vLLM {versions}; "run" is
of {ran}.

| checkpoint | type | MoE layers | K of E | gate | op | vLLM capture | weights to vLLM |
|---|---|---|---|---|---|---|---|
"""

# The op has no argument for these. test_checkpoints.py computes them from the words.
OWN_GATES = {
    "gemma4_text": "softmax, renormalised, times a learned scale of the expert",
    "llama4_text": "sigmoid, of the input of the experts",
    "minimax_m2": "sigmoid, renormalised, bias",
}


@dataclass(frozen=True)
class Checkpoint:
    """What attaching to the twin of a checkpoint found."""

    name: str
    model_type: str
    layers: int
    experts: int
    top_k: int
    gate: str
    covered: bool

    @property
    def row(self) -> str:
        """Of the table."""
        op = "yes" if self.covered else "no"
        cells = (self.layers, f"{self.top_k} of {self.experts}", self.gate, op, *vllm_cells(self.model_type))
        return f"| {self.name} | `{self.model_type}` | {' | '.join(map(str, cells))} |\n"


@cache
def examine(path: Path) -> Checkpoint:
    """
    Attach to a narrow twin of a checkpoint.

    Args:
        path (`Path`):
            Its `config.json`, with `_source`.

    Returns:
        [`Checkpoint`].

    Raises:
        `KeyError`: If the file does not say where its sizes are from.
    """
    name = path.parent.name
    if "_source" not in json.loads(path.read_text()):
        raise KeyError(f"{path} has no `_source`. Say there where its sizes are from.")
    config = AutoConfig.from_pretrained(path.parent)
    twin = twin_of(config, name)
    try:
        replay = RouterReplay(twin, "op")
    except UnsupportedRouterError:
        replay = RouterReplay(twin, "intercept")
    formulas = {router.formula for router in replay.routers if isinstance(router, GatedRouter)}
    replay.remove()
    if formulas:
        (formula,) = formulas
        gate = in_words(formula)
    else:
        gate = OWN_GATES[twin.config.model_type]
    sizes = len(replay.moe_layers), replay.num_experts, replay.top_k
    return Checkpoint(name, config.model_type, *sizes, gate, bool(formulas))


@torch.no_grad()
def twin_of(config: Any, name: str) -> Any:
    """The narrow twin, with random values for what is equal for all experts in a model that has not been trained."""
    twin = narrow_twin(config, name)
    generator = torch.Generator().manual_seed(0)
    for path, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
        if path.endswith(("e_score_correction_bias", "per_expert_scale")):
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    return twin


def vllm_cells(model_type: str) -> tuple[str, str]:
    """Of capture and of weight sync; versions are named where they differ."""
    found = {version: results[model_type] for version, results in VLLM.items()}
    ran = [result["rows_that_differ"][0] for result in found.values() if "rows_that_differ" in result]
    if not all(result["capture_attaches"] for result in found.values()) or any(ran):
        raise ValueError(f"capture of {model_type} does not hold, and the page has no word for it: {found}")
    weights = {version: result["weights"] for version, result in found.items()}
    words = set(weights.values())
    sync = words.pop() if len(words) == 1 else ", ".join(f"{word} ({version})" for version, word in weights.items())
    return "run" if ran else "attaches", sync


def in_words(formula: GateFormula) -> str:
    """A gate that the op computes."""
    words = [formula.score.replace("topk_softmax", "softmax")]
    words += ["renormalised"] * formula.renormalize
    words += [f"times {formula.scale:g}"] * (formula.scale != 1)
    words += ["bias"] * (formula.bias is not None)
    words += [f"best {formula.topk_group} of {formula.n_group} groups"] * (formula.n_group > 1)
    return ", ".join(words)


def render(page: str) -> str:
    """The page with the table of today."""
    ran = [
        version for version, results in VLLM.items() if any("rows_that_differ" in found for found in results.values())
    ]
    images = [key for results in VLLM.values() for key in results if key.endswith(", images")]
    if any(vllm_cells(key) != ("attaches", "yes") for key in images):
        raise ValueError(f"the page says that weights and capture of these hold: {sorted(set(images))}")
    head = HEAD.format(version=transformers.__version__, versions=" and ".join(VLLM), ran=" and ".join(ran))
    rows = "".join(examine(path).row for path in CONFIGS)
    return _TABLE.sub(lambda marks: marks[1] + head + rows + marks[2], page)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PAGE.write_text(render(PAGE.read_text(encoding="ascii")), encoding="ascii")
