#!/usr/bin/env bash
# What the auxiliary loss of Qwen3-MoE and Mixtral says of layers that each use two of their eight experts
#
# Versions: Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0.
# Expected: experts of one layer have nothing to do with those of another, so each layer is balanced for itself, and the
# loss is as large wherever every layer sends all of its tokens to two experts.
# Behaviour: loads are averaged over all layers, expert number by expert number, before they are judged. Where each layer
# has two favourites of its own, the loss is that of an even load, 2, its minimum, and has no gradient that would change it.
# Output seen:
#     Qwen3-MoE, all layers use experts 0 and 1: loss 5.686, its gradient 0.00378
#     Qwen3-MoE, layer l uses experts 2l and 2l + 1: loss 2.000, its gradient 0.00000
#     Mixtral, all layers use experts 0 and 1: loss 5.686, its gradient 0.00378
#     Mixtral, layer l uses experts 2l and 2l + 1: loss 2.000, its gradient 0.00000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0"
cd "$folder"
venv/bin/python - <<'PYTHON'
import sys

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as of_mixtral
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func as of_qwen3

LAYERS, TOKENS, EXPERTS = 4, 64, 8


def of_favourites(loss_of, favourites):
    torch.manual_seed(0)
    router_logits = []
    for first in favourites:
        logits = 0.1 * torch.randn(TOKENS, EXPERTS)
        logits[:, first : first + 2] += 2.0
        router_logits.append(logits.requires_grad_())
    loss = loss_of(tuple(router_logits), EXPERTS, 2)
    loss.backward()
    return loss.item(), max(logits.grad.abs().max().item() for logits in router_logits)


found = []
for name, loss_of in (("Qwen3-MoE", of_qwen3), ("Mixtral", of_mixtral)):
    for label, favourites in (
        ("all layers use experts 0 and 1", [0] * LAYERS),
        ("layer l uses experts 2l and 2l + 1", [2 * layer for layer in range(LAYERS)]),
    ):
        loss, gradient = of_favourites(loss_of, favourites)
        print(f"{name}, {label}: loss {loss:.3f}, its gradient {gradient:.5f}")
        found += [loss > 5 and gradient > 1e-3 if not any(favourites) else abs(loss - 2) < 0.01 and gradient < 1e-6]
sys.exit(not all(found))
PYTHON
