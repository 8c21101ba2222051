"""Checkpoints whose sizes the repository holds: this script writes docs/checkpoints.md.

Legend: E experts, K experts per token.
"""

from __future__ import annotations

import json
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
PAGE = ROOT / "docs" / "checkpoints.md"
VLLM = json.loads((Path(__file__).parent / "vllm_classes.json").read_text())
CONFIGS = sorted((ROOT / "examples" / "recipes" / "configs").glob("*/config.json"))

HEAD = """\
# Supported models by checkpoint

Checkpoints with a config in `examples/recipes/configs`, by `python tests/documents/checkpoint_page.py`. None is the
file of the Hub: their sources are named below. The type of a model decides whether it is supported, and
[all types](supported_models.md) are listed. None of these has been run at full size.

MoE layers, E experts, K experts per token and the gate were found by attaching to a twin of each, which has its
layers, experts and K but small widths and random weights, with Transformers {version}.

* Gate: the score of an expert; whether the K weights are divided by their sum; what they are multiplied by; what takes
  part in the selection alone: a bias for each expert, groups of experts.
* Op: whether [`masked_topk_gating`](gating.md) covers the gate. Where it does not, replay intercepts the selection.

What vLLM does was found on a CPU with small random models of each type, and vLLM {versions}, by
`python tests/vllm_cpu/vllm_classes.py --run` (2026-11-25). Both sides have the class for text alone, not quantized.
Where both have the class that takes images ({images}), weights arrive and capture
attaches, too. A text model trained beside an engine with the other class was not tried: its names are others.

* vLLM capture: "run": the engine sampled, and all ids that it returned are those of a forward of Transformers (vLLM
  {ran}). "attaches": vLLM attaches its capture to all MoE layers; the type did not run on a CPU. A MoE kernel that
  routes inside itself is captured from vLLM 0.28 on.
* Weight sync: TRL 1.16 sends each parameter under its name in Transformers. "yes": vLLM then has the weights that it
  loads from the saved model. "refused": `load_weights` raises. "lost": it raises nothing, and the experts keep their
  old weights. A selection bias is a buffer, and TRL sends none: vLLM keeps that of the checkpoint.

| Checkpoint | Type | MoE layers | E | K | Gate | Op | vLLM capture | Weight sync |
|---|---|---|---|---|---|---|---|---|
"""

# The op has no argument for these. test_checkpoints.py computes them from the words.
OWN_GATES = {
    "gemma4_text": "softmax, renormalised, times a learned scale of the expert",
    "llama4_text": "sigmoid, of the input of the experts",
    "minimax_m2": "sigmoid, renormalised, bias",
}


@dataclass(frozen=True)
class Checkpoint:
    """What attaching to the twin of a checkpoint found, and where its sizes are from."""

    name: str
    model_type: str
    layers: int
    experts: int
    top_k: int
    gate: str
    covered: bool
    source: str

    @property
    def row(self) -> str:
        """Of the table."""
        op = "yes" if self.covered else "no"
        cells = (self.layers, self.experts, self.top_k, self.gate, op, *vllm_cells(self.model_type))
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
    source = json.loads(path.read_text())["_source"]
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
    return Checkpoint(name, config.model_type, *sizes, gate, bool(formulas), source)


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


def render() -> str:
    """The page."""
    checkpoints = [examine(path) for path in CONFIGS]
    sources = "".join(f"* {checkpoint.name}: {checkpoint.source}\n" for checkpoint in checkpoints)
    ran = [
        version for version, results in VLLM.items() if any("rows_that_differ" in found for found in results.values())
    ]
    images = sorted({key for results in VLLM.values() for key in results if key.endswith(", images")})
    if any(vllm_cells(key) != ("attaches", "yes") for key in images):
        raise ValueError(f"the page says that weights and capture of these hold: {images}")
    head = HEAD.format(
        images=", ".join(f"`{key.removesuffix(', images')}`" for key in images),
        version=transformers.__version__,
        versions=" and ".join(VLLM),
        ran=" and ".join(ran),
    )
    return head + "".join(checkpoint.row for checkpoint in checkpoints) + "\n## Sources\n\n" + sources


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PAGE.write_text(render(), encoding="ascii")
