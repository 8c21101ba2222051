#!/usr/bin/env bash
# What `router_jitter_noise` of Mixtral and of Switch Transformers changes in training mode
#
# Versions: Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0.
# Expected: as its name says, the noise is on what the router reads; experts compute with the hidden states as they are,
# whatever the dtype of the model.
# Behaviour: both multiply a tensor in place. Mixtral's is the one that its experts read, so they get noisy hidden states
# in every dtype. In Switch Transformers the router first converts it to float32: a bfloat16 model has its noise on the
# copy, a float32 model on what its experts read. So the same setting trains two different models.
# Output seen:
#     Mixtral, float32: experts read noise True
#     Mixtral, bfloat16: experts read noise True
#     Switch, float32: experts read noise True
#     Switch, bfloat16: experts read noise False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0"
cd "$folder"
venv/bin/python - <<'PYTHON'
import sys

import torch
from transformers import MixtralConfig, SwitchTransformersConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

mixtral = MixtralConfig(hidden_size=32, intermediate_size=32, num_local_experts=4, router_jitter_noise=0.5)
switch = SwitchTransformersConfig(d_model=32, d_ff=32, num_experts=4, expert_capacity=64, router_jitter_noise=0.5)
found = {}
for name, layer, config in (
    ("Mixtral", MixtralSparseMoeBlock, mixtral),
    ("Switch", SwitchTransformersSparseMLP, switch),
):
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        block = layer(config).train()
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        hidden, read = torch.randn(1, 8, 32).to(dtype), []
        block.experts.register_forward_pre_hook(lambda module, args: read.append(args[0].detach().clone()))
        block.to(dtype)(hidden.clone())
        label = f"{name}, {str(dtype).removeprefix('torch.')}"
        found[label] = not torch.equal(read[0].view(-1, 32), hidden.view(-1, 32))
        print(f"{label}: experts read noise {found[label]}")
sys.exit([*found.values()] != [True, True, True, False])
PYTHON
