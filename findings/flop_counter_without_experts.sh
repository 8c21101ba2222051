#!/usr/bin/env bash
# torch.utils.flop_counter on a mixture of experts
#
# Versions: Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0.
# Expected: the operations of a forward do not depend on how its experts are computed.
# Behaviour: the counter has no formula for the grouped product that Transformers takes by default, says nothing of it,
# and counts a forward without its experts. A utilisation computed from it is too low by the share of the experts.
# Output seen:
#     eager: 1081344
#     batched_mm: 1081344
#     grouped_mm: 688128
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
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=2)).eval()
chosen, counted = model.config._experts_implementation, {}
for name in ("eager", "batched_mm", "grouped_mm"):
    model.set_experts_implementation(name)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(32)[None])
    counted[name] = counter.get_total_flops()
    print(f"{name}: {counted[name]}")
print("chosen by default:", chosen)
sys.exit(not (counted["eager"] == counted["batched_mm"] == 1081344 and counted["grouped_mm"] == 688128))
PYTHON
