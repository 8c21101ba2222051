"""One layer of a model, watched: what goes into its mixture and comes out, and the gradient of its router.

Legend: B batch, T tokens of a sequence, N = B * T, E experts.
"""

from __future__ import annotations

import re

import torch
from model_zoo import build_tiny
from oracles import InDouble

from trl_r3.cli.experts import experts_of


def record_of(model, replay, ids, **kwargs):
    with torch.no_grad(), replay.record() as recorded:
        model(ids, **kwargs)
    return recorded.routed_experts


def in_float64(model_type, **overrides):
    if model_type == "qwen3_moe":
        overrides["norm_topk_prob"] = True  # as in every checkpoint of the family
    model = build_tiny(model_type, **overrides).double()
    model.set_experts_implementation("eager")  # the grouped kernel has no float64
    return model


def blocks_of(model):
    """The mixture blocks by decoder layer."""
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    return {layer: modules[names[experts].rpartition(".")[0]] for layer, experts in experts_of(model).items()}


class Watched:
    """Inputs and outputs of modules in the last forward."""

    def __init__(self, modules):
        self.inputs, self.outputs = {}, {}
        for key, module in modules.items():
            module.register_forward_hook(lambda module, args, output, key=key: self.note(key, args, output))

    def note(self, key, args, output):
        self.inputs[key] = args[0].detach().flatten(0, -2)
        output = output[0] if isinstance(output, tuple) else output
        self.outputs[key] = output.detach().flatten(0, -2)


def logit_gradients(model, replay, record, ids):
    """Gradient of a loss with respect to the router logits `(N, E)` of the first MoE layer."""
    logits = []
    router = next(m for n, m in model.named_modules() if re.search(r"layers\.1\.mlp\.(gate|router)$", n))

    def keep(module, args, output):
        output[0].retain_grad()
        logits.append(output[0])

    handle = router.register_forward_hook(keep)
    with InDouble(), replay.replay(record):
        out = model(ids, labels=ids)
    out.loss.backward()
    handle.remove()
    return logits[0].grad, logits[0].detach()


def batch() -> torch.Tensor:
    return torch.randint(2, 120, (2, 12), generator=torch.Generator().manual_seed(0))
