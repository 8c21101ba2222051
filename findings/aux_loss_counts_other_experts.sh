#!/usr/bin/env bash
# Which experts the auxiliary loss of MiniMax-M2 and Ernie 4.5 counts
#
# Versions: Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0.
# Expected: the share of tokens that it balances is that of the experts which the layer selected: with a selection bias
# that sends every token to experts 0 and 1, it is another than without.
# Behaviour: it is the same to the last bit. It selects anew, by the softmax of the router logits alone, where the layer
# selects by scores and bias. So it balances a load that no expert has, and the one that collapses is not seen.
# Output seen:
#     MiniMaxM2ForCausalLM: loss without bias 2.0517, with a bias that selects [0, 1]: 2.0517, of what is selected 2.3015
#     Ernie4_5_MoeForCausalLM: loss without bias 2.3053, with a bias that selects [0, 1]: 2.3053, of what is selected 1.4541
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0"
cd "$folder"
venv/bin/python - <<'PYTHON'
import sys

import torch
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, MiniMaxM2Config, MiniMaxM2ForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5, "pad_token_id": 0}
minimax = MiniMaxM2Config(**sizes, **heads, num_local_experts=8, num_experts_per_tok=2, rotary_dim=16)
layers = {"moe_layer_start_index": 0, "moe_layer_end_index": 0, "moe_intermediate_size": 16}
ernie = Ernie4_5_MoeConfig(**sizes, **heads, **layers, moe_num_experts=8, moe_k=2)
ids = torch.arange(64).view(4, 16)
right = []
for build, config in ((MiniMaxM2ForCausalLM, minimax), (Ernie4_5_MoeForCausalLM, ernie)):
    torch.manual_seed(0)
    model = build(config).eval()
    tensors = [*model.named_buffers(), *model.named_parameters()]
    (bias,) = {id(each): each for name, each in tensors if "correction_bias" in name}.values()
    selected = []
    (experts,) = [module for name, module in model.named_modules() if name.endswith(".experts")]
    experts.register_forward_pre_hook(lambda module, args: selected.append(args[1]))
    with torch.no_grad():
        bias.zero_()
        free = model(ids, output_router_logits=True).aux_loss
        bias.view(-1)[:2] = 100
        output = model(ids, output_router_logits=True)
    counts = torch.bincount(selected[-1].reshape(-1), minlength=8) / ids.numel()
    of_selected = float(8 * (counts * output.router_logits[0].float().softmax(-1).mean(0)).sum())
    print(
        f"{build.__name__}: loss without bias {free:.4f}, with a bias that selects {selected[-1].unique().tolist()}: "
        f"{output.aux_loss:.4f}, of what is selected {of_selected:.4f}"
    )
    right.append(free == output.aux_loss and abs(of_selected - output.aux_loss) > 0.1)
sys.exit(not all(right))
PYTHON
