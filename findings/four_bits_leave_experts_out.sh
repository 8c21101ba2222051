#!/usr/bin/env bash
# How much of a mixture of experts `load_in_4bit` and `load_in_8bit` of bitsandbytes quantize
#
# Versions: Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0, accelerate 1.15.0, bitsandbytes 0.50.2.
# Expected: all large matrices of the decoder, experts first: they are nearly all of the model.
# Behaviour: bitsandbytes takes `torch.nn.Linear` modules, and Transformers keeps all experts of a layer in one parameter
# of three dimensions. It stays as it was, in the dtype that the model is loaded in, and nothing says so: the model is
# nearly as large as without quantization.
# Output seen:
#     load_in_4bit: attention uint8, experts bfloat16, 89 % of the memory without it
#     load_in_8bit: attention int8, experts bfloat16, 93 % of the memory without it
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0" "bitsandbytes==0.50.2"
cd "$folder"
venv/bin/python - <<'PYTHON'
import sys

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
config = Qwen3MoeConfig(**sizes, **heads, num_experts=16, num_experts_per_tok=2)
Qwen3MoeForCausalLM(config).bfloat16().save_pretrained("model")
whole = AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16).get_memory_footprint()
found = []
for bits in ("load_in_4bit", "load_in_8bit"):
    settings = BitsAndBytesConfig(**{bits: True})
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16, quantization_config=settings)
    layer = model.model.layers[0]
    dtypes = [str(p.dtype).removeprefix("torch.") for p in (layer.self_attn.q_proj.weight, layer.mlp.experts.down_proj)]
    share = model.get_memory_footprint() / whole
    print(f"{bits}: attention {dtypes[0]}, experts {dtypes[1]}, {share:.0%} of the memory without it".replace("%", " %"))
    found.append((*dtypes, share > 0.85))
sys.exit(found != [("uint8", "bfloat16", True), ("int8", "bfloat16", True)])
PYTHON
