#!/usr/bin/env bash
# Which matrices LoRA adapts where `target_modules` names gate_proj, up_proj and down_proj, or says "all-linear"
#
# Versions: Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2.
# Expected: the same names adapt the same kinds of layers in every family: all linear layers called so, those of dense
# layers and shared experts among them. "all-linear" leaves a router alone that is no linear layer.
# Behaviour: for families whose checkpoints Transformers converts by the rules of Qwen2-MoE (DeepSeek-V3, Qwen3-MoE, ...)
# PEFT takes these names for routed experts and nothing else: dense layers and shared experts get no adapter, with
# "all-linear" neither. For Qwen2-MoE itself it is the other way round. And "all-linear" trains the router of the former.
# Output seen:
#     DeepseekV3, the three names: experts
#     DeepseekV3, all-linear: attention, experts, router
#     Qwen2Moe, the three names: dense layer, shared expert
#     Qwen2Moe, all-linear: attention, dense layer, shared expert
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2"
cd "$folder"
venv/bin/python - 2> /dev/null <<'PYTHON'
import sys

from peft import LoraConfig, get_peft_model
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16, "num_hidden_layers": 2}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
attention = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
groups = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
deepseek = DeepseekV3Config(**sizes, **heads, **attention, **groups)
qwen = Qwen2MoeConfig(**sizes, **heads, num_experts=4, shared_expert_intermediate_size=16, mlp_only_layers=[0])
PARTS = {"self_attn": "attention", "layers.0.mlp": "dense layer", "mlp.experts": "experts", "mlp.gate.": "router"}
PARTS["shared_expert"] = "shared expert"
names, found = ["gate_proj", "up_proj", "down_proj"], []
for build, config in ((DeepseekV3ForCausalLM, deepseek), (Qwen2MoeForCausalLM, qwen)):
    for label, targets in (("the three names", names), ("all-linear", "all-linear")):
        adapted = get_peft_model(build(config), LoraConfig(target_modules=targets, r=4, task_type="CAUSAL_LM"))
        trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        parts = sorted(part for piece, part in PARTS.items() if any(piece in name for name in trained))
        print(f"{build.__name__.removesuffix('ForCausalLM')}, {label}: {', '.join(parts)}")
        found.append(parts)
shared = ["dense layer", "shared expert"]
sys.exit(found != [["experts"], ["attention", "experts", "router"], shared, ["attention", *shared]])
PYTHON
