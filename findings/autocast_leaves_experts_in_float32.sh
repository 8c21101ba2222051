#!/usr/bin/env bash
# The precision that experts compute in under autocast
#
# Versions: Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0.
# Expected: under autocast to bfloat16 (`bf16=True` of Trainer) a model with float32 weights multiplies in bfloat16, experts
# first: they are nearly all of its products.
# Behaviour: only if its experts are computed by "eager" or "batched_mm". Autocast does not know the grouped product that
# Transformers takes by default: it stays in float32 beside an attention in bfloat16, and nothing says so. So the same
# model under the same setting has other numbers, and another speed, by how its experts are computed.
# Output seen:
#     eager: attention bfloat16, experts bfloat16
#     batched_mm: attention bfloat16, experts bfloat16
#     grouped_mm: attention bfloat16, experts float32
#     chosen by default: grouped_mm
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0"
cd "$folder"
venv/bin/python - 2> /dev/null <<'PYTHON'
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=2)).eval()
layer, where, seen = model.model.layers[0], [], {}
for name, module in (("attention", layer.self_attn), ("experts", layer.mlp.experts)):
    module.register_forward_pre_hook(lambda *_, name=name: where.append(name))
    module.register_forward_hook(lambda *_: where.clear())


class Products(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if where and function.__name__.split(".")[0] in ("mm", "bmm", "addmm", "_grouped_mm"):
            seen.setdefault(where[-1], set()).add(str(args[0].dtype).removeprefix("torch."))
        return function(*args, **(kwargs or {}))


chosen, found = model.config._experts_implementation, []
for name in ("eager", "batched_mm", "grouped_mm"):
    model.set_experts_implementation(name)
    seen.clear()
    with torch.no_grad(), Products(), torch.autocast("cpu", torch.bfloat16):
        model(torch.arange(16)[None])
    (attention,), (experts,) = seen["attention"], seen["experts"]
    print(f"{name}: attention {attention}, experts {experts}")
    found.append((attention, experts))
print("chosen by default:", chosen)
both = ("bfloat16", "bfloat16")
sys.exit(found != [both, both, ("bfloat16", "float32")] or chosen != "grouped_mm")
PYTHON
