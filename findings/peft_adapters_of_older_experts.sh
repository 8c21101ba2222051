#!/usr/bin/env bash
# Loading a LoRA adapter that was trained on the experts of DeepSeek-V3 while each was a module, before Transformers 5
#
# Versions: Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2, safetensors from its requirements.
# Expected: PEFT, which converts such adapters, adds to each matrix the product that the adapter holds for it, scaled by
# alpha / r, or alpha / sqrt(r) with `use_rslora`; or it says what it cannot load.
# Behaviour: it loads the routed experts and drops the weights of dense layers and shared experts, without an error, and a
# warning alone that the pattern of ranks matched nothing. Gate and up projection become one matrix of twice the rank, for
# which alpha is doubled: right for alpha / r, but with `use_rslora` their part is sqrt(2) times too large.
# Output seen: what is added, over what the adapter holds
#     alpha / r: gate and up of experts 1.000, down of experts 1.000, shared expert 0.000, dense layer 0.000
#     use_rslora: gate and up of experts 1.414, down of experts 1.000, shared expert 0.000, dense layer 0.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2"
cd "$folder"
venv/bin/python - 2> /dev/null <<'PYTHON'
import sys
import tempfile

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16, "num_hidden_layers": 2}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
attention = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
groups = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
NAMES, R, ALPHA = ["gate_proj", "up_proj", "down_proj"], 4, 8
EXPERTS, SHARED, DENSE = "model.layers.1.mlp.experts", "model.layers.1.mlp.shared_experts", "model.layers.0.mlp"


def shares(rslora):
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **attention, **groups))
    saved, held = {}, {}
    for layer, inner in (*((f"{EXPERTS}.{expert}", 16) for expert in range(4)), (SHARED, 16), (DENSE, 24)):
        for name in NAMES:
            rows, columns = (32, inner) if name == "down_proj" else (inner, 32)
            a, b = 0.1 * torch.randn(R, columns), 0.1 * torch.randn(rows, R)
            key = f"base_model.model.{layer}.{name}"
            saved[f"{key}.lora_A.weight"], saved[f"{key}.lora_B.weight"] = a, b
            held[layer, name] = ALPHA / (R**0.5 if rslora else R) * b @ a
    folder = tempfile.mkdtemp(dir=".")
    save_file(saved, f"{folder}/adapter_model.safetensors", {"format": "pt"})
    facts = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "of-transformers-4"}
    LoraConfig(r=R, lora_alpha=ALPHA, use_rslora=rslora, target_modules=NAMES, **facts).save_pretrained(folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()

    def added(name, held):
        return ((merged[name] - before[name]) * held).sum().item() / (held * held).sum().item()

    gate_up = [torch.cat([held[f"{EXPERTS}.{e}", name] for name in NAMES[:2]]) for e in range(4)]
    down = [held[f"{EXPERTS}.{e}", "down_proj"] for e in range(4)]
    return [
        added(f"{EXPERTS}.gate_up_proj", torch.stack(gate_up)),
        added(f"{EXPERTS}.down_proj", torch.stack(down)),
        *(added(f"{layer}.up_proj.weight", held[layer, "up_proj"]) for layer in (SHARED, DENSE)),
    ]


labels, found = ["gate and up of experts", "down of experts", "shared expert", "dense layer"], []
for label, rslora in (("alpha / r", False), ("use_rslora", True)):
    found.append([round(share, 3) for share in shares(rslora)])
    print(f"{label}: " + ", ".join(f"{part} {share:.3f}" for part, share in zip(labels, found[-1], strict=True)))
sys.exit(found != [[1, 1, 0, 0], [1.414, 1, 0, 0]])
PYTHON
