#!/usr/bin/env bash
# Which of two experts with equal scores is selected: by PyTorch, as Transformers asks it, and by JAX
#
# Versions: Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0, jax 0.10.2.
# Expected: ties at the edge of a selection are rare, and the expert with the lower number wins them, as in JAX.
# Behaviour: router logits of a bfloat16 model have so few values that one token in sixteen has such a tie in each layer of
# 128 experts. PyTorch takes experts from the middle, and the lowest only where there are at least 64 for each one selected.
# So two engines with the same logits, bit for bit, send tokens to different experts.
# Output seen:
#     of 64 equal scores, 2 selected: PyTorch [42, 43], JAX [0, 1]
#     of 128 equal scores, 2 selected: PyTorch [0, 1], JAX [0, 1]
#     Qwen3-MoE, 8 of 128 experts, bfloat16: 6.4 % of the tokens have a tie, 3.2 % other experts in JAX
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0" "jax==0.10.2"
cd "$folder"
venv/bin/python - 2> /dev/null <<'PYTHON'
import sys

import jax
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

TOKENS, EXPERTS, K = 20_000, 128, 8


def by_jax(scores, k):
    return torch.tensor(jax.lax.top_k(jax.numpy.asarray(scores.numpy()), k)[1].tolist())


right = []
for count in (64, 128):
    equal = torch.zeros(1, count)
    ours, theirs = sorted(equal.topk(2).indices[0].tolist()), by_jax(equal, 2)[0].tolist()
    print(f"of {count} equal scores, 2 selected: PyTorch {ours}, JAX {theirs}")
    right.append((ours == [0, 1]) == (count == 128) and theirs == [0, 1])
torch.manual_seed(0)
router = Qwen3MoeTopKRouter(Qwen3MoeConfig(hidden_size=2048, num_experts=EXPERTS, num_experts_per_tok=K)).bfloat16()
torch.nn.init.normal_(router.weight, std=0.02)
with torch.no_grad():
    logits, _, selected = router(torch.randn(TOKENS, 2048).bfloat16())
scores = logits.float().softmax(-1)
ordered = scores.sort(-1, descending=True).values
ties = (ordered[:, K - 1] == ordered[:, K]).float().mean().item()
other = (selected.sort(-1).values != by_jax(scores, K).sort(-1).values).any(-1).float().mean().item()
shares = f"{ties:.1%} of the tokens have a tie, {other:.1%} other experts in JAX".replace("%", " %")
print(f"Qwen3-MoE, {K} of {EXPERTS} experts, bfloat16: {shares}")
right.append(ties > 0.05 and other > 0.02)
sys.exit(not all(right))
PYTHON
