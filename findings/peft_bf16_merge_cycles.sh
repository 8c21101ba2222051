#!/usr/bin/env bash
# Merging a LoRA adapter into a bfloat16 base and taking it out again: how does the loss of bits grow?
#
# Versions: Python 3.11, torch 2.13.0 (CPU), peft 0.21.2.
# Expected: more weights differ from the first base with each cycle.
# Behaviour: the first cycle changes a third of the weights, and no later one changes any more: the rounded base is a
# fixed point as long as the adapter stays as it is. A test that merges many times without training in between sees
# the loss of one cycle.
# Output seen:
#     cycle 1: 30.27 % of the weights differ
#     cycle 10: 30.27 % of the weights differ
#     cycle 100: 30.27 % of the weights differ
#     with the adapter moved in between, cycle 100: 90.94 % of the weights differ
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "peft==0.21.2"
cd "$folder"
venv/bin/python - <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


def shares(moves):
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("q", nn.Linear(256, 256, bias=False))
    model = get_peft_model(net.bfloat16(), LoraConfig(r=8, target_modules=["q"], init_lora_weights=False))
    (base,) = [p for name, p in model.named_parameters() if "base_layer" in name]
    own, found = base.detach().clone(), {}
    for cycle in range(1, 101):
        model.merge_adapter()
        model.unmerge_adapter()
        found[cycle] = (base != own).float().mean().item()
        if moves:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.add_(0.01 * torch.randn_like(parameter))
    return found


still, moved = shares(False), shares(True)
for cycle in (1, 10, 100):
    print(f"cycle {cycle}: {still[cycle]:.2%} of the weights differ".replace("%", " %"))
print(f"with the adapter moved in between, cycle 100: {moved[100]:.2%} of the weights differ".replace("%", " %"))
sys.exit(not (still[1] == still[10] == still[100] > 0.1 and moved[100] > 2 * still[100]))
PYTHON
