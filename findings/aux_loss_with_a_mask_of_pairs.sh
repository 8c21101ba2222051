#!/usr/bin/env bash
# The auxiliary loss of a mixture of experts under an attention mask of (batch, 1, queries, keys)
#
# Versions: Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0.
# Expected: a model that scores under such a mask, as it does, computes its auxiliary loss under it, too.
# Behaviour: the loss takes the mask for one of (batch, tokens) and raises about sizes that name neither. Packed and
# prefix-shared training, which need such masks, have to switch the auxiliary loss off or pass it another mask.
# Output seen:
#     logits: (2, 6, 64)
#     auxiliary loss: RuntimeError: The size of tensor a (12) must match the size of tensor b (72) at non-singleton dimension 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0"
cd "$folder"
venv/bin/python - <<'PYTHON'
import sys

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=2)).eval()
ids, mask = torch.arange(12).view(2, 6), torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6)
logits = tuple(model(ids, attention_mask=mask).logits.shape)
print("logits:", logits)
try:
    found = str(model(ids, attention_mask=mask, output_router_logits=True).aux_loss)
except Exception as error:
    found = f"{type(error).__name__}: {error}"
print("auxiliary loss:", found)
sys.exit(not (logits == (2, 6, 64) and found.startswith("RuntimeError: The size of tensor a (12)")))
PYTHON
