"""Every mixture-of-experts model type of the installed Transformers, and what runs on each.

Legend: B batch, T tokens of a sequence, N = B * T, E experts.
"""

from __future__ import annotations

import re

import torch
import transformers
from oracles import gradients
from packaging.version import Version
from supported_models import MODEL_TYPES, PAGE, listed_types

from trl_r3.cli.experts import experts_of

REFUSED = {
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion has routers in 2 stacks of layers",
    "doge": "DogeForCausalLM has no module named `experts`, .* `torch.topk` in DogeCDMoE",
    "inkling2_loop": r"layers\.1\.mlp\.gate \(Inkling2LoopTopKRouter\) ran 2 times in one forward",
    "inkling2_loop_text": r"layers\.1\.mlp\.gate \(Inkling2LoopTopKRouter\) ran 2 times in one forward",
    "jetmoe": "JetMoeForCausalLM has 3 modules named `experts` .* called none of them",
    "phimoe": r"PhimoeSparseMoeBlock.* without a `torch.topk`.* router \(PhimoeTopKRouter\)",
}
PAGE_TEXT = PAGE.read_text(encoding="ascii")
(PAGE_VERSION,) = re.findall(r"of Transformers (\S+) that", PAGE_TEXT)
ON_PAGE = listed_types()
# Types that a Transformers older than the page may have in another form, or in one that raises by itself
CHANGED = {"aria", "aria_text", "diffusion_gemma", "doge", "glm5_next", "qwen4_exp", "qwen4_exp_text"}
IS_OLDER = Version(transformers.__version__) < Version(PAGE_VERSION)
KNOWN = {*ON_PAGE, *REFUSED} - (CHANGED if IS_OLDER else set())
LISTED = [model_type for model_type in MODEL_TYPES if model_type in KNOWN]
TRIED = [model_type for model_type in MODEL_TYPES if model_type not in KNOWN]
SUPPORTED = [model_type for model_type in LISTED if model_type not in REFUSED]


def forward(model, ids, **kwargs):
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **kwargs)


def backward(model, ids, **kwargs):
    out = forward(model, ids, labels=ids, **kwargs)
    out.loss.backward()
    return out.logits.detach(), gradients(model)


@torch.no_grad()
def own_record(model, replay, ids):
    with replay.record() as recorded:
        forward(model, ids)
    return recorded.routed_experts


class Executed:
    """Which experts ran for each token: `(N, E)` of `bool` by decoder layer, in the last forward."""

    def __init__(self, model, replay):
        self.num_experts = replay.num_experts
        self.masks = {}
        experts = experts_of(model)
        for layer in replay.moe_layers:
            experts[layer].register_forward_pre_hook(
                lambda module, args, kwargs, layer=layer: self.note(layer, args, kwargs), with_kwargs=True
            )

    def note(self, layer, args, kwargs):
        given = [a for a in [*args, *kwargs.values()] if torch.is_tensor(a)]
        chosen = [a for a in given if not a.is_floating_point()]
        if chosen:
            assert len(chosen) == 1
            self.masks[layer] = as_mask(chosen[0], self.num_experts)
        else:  # Llama 4 feeds every expert every token, times a score that is 0 unless the expert is chosen
            self.masks[layer] = (given[0].unflatten(0, (self.num_experts, -1)) != 0).any(-1).T

    def all(self, ids):
        return torch.stack([self.masks[layer] for layer in sorted(self.masks)], 1).unflatten(0, ids.shape)


def as_mask(ids, num_experts):
    flat = ids.long().reshape(-1, ids.shape[-1])
    return torch.zeros(flat.shape[0], num_experts, dtype=torch.bool).scatter(1, flat, True)


def expected_mask(model_type, record, num_experts):
    if model_type == "zaya":  # its last choice skips the experts, by expert 0 with a weight of 0
        record = record.where(record != num_experts - 1, 0)
    masks = [
        as_mask(record[:, :, slot], num_experts).unflatten(0, record.shape[:2]) for slot in range(record.shape[2])
    ]
    return torch.stack(masks, 2)
