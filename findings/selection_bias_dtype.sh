#!/usr/bin/env bash
# The dtype of a router's selection bias (DeepSeek-V3, GLM-4.5) in a bfloat16 model
#
# Versions: Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0.
# Expected: a model loaded with `dtype=torch.bfloat16` is the one that `.bfloat16()` makes of the float32 model.
# Behaviour: it is not: loading keeps the bias in float32, and `.bfloat16()` or `.to(torch.bfloat16)` rounds it for good,
# though the differences that decide between experts are often below the steps of bfloat16.
# Output seen:
#     DeepseekV3ForCausalLM loaded: torch.float32, by .to(): torch.bfloat16, values left of 64: 26
#     Glm4MoeForCausalLM loaded: torch.float32, by .to(): torch.bfloat16, values left of 64: 26
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0"
cd "$folder"
venv/bin/python - <<'PYTHON'
import sys
import tempfile

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
routing = {"n_routed_experts": 64, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
heads, right = {"num_attention_heads": 2, "num_key_value_heads": 2}, True
for config, model_class in ((DeepseekV3Config, DeepseekV3ForCausalLM), (Glm4MoeConfig, Glm4MoeForCausalLM)):
    model = model_class(config(**sizes, **routing, **heads))
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    bias.data.copy_(8 + torch.arange(64) * 0.025)  # biases of trained models are close to one another
    folder = tempfile.mkdtemp(dir=".")
    model.save_pretrained(folder)
    loaded = model_class.from_pretrained(folder, dtype=torch.bfloat16).model.layers[1].mlp.gate.e_score_correction_bias
    cast = model.bfloat16().model.layers[1].mlp.gate.e_score_correction_bias
    left = len(cast.unique())
    print(f"{model_class.__name__} loaded: {loaded.dtype}, by .to(): {cast.dtype}, values left of 64: {left}")
    right = right and (loaded.dtype, cast.dtype) == (torch.float32, torch.bfloat16) and left < 64
sys.exit(not right)
PYTHON
