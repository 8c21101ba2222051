#!/usr/bin/env bash
# Loading a mixture of experts whose checkpoint is FP8 by NVIDIA's modelopt
#
# Versions: Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0, safetensors from its requirements.
# Expected: a quantisation method that Transformers does not know is an error, as the stored numbers mean nothing without
# their scales.
# Behaviour: it loads: a warning says that the method is unknown, the scales are listed as unexpected keys, and the
# numbers of the FP8 grid become the weights, thousands of times too large.
# Output seen:
#     largest weight saved: 0.0762
#     largest weight loaded: 448.0
#     missing 0, unexpected 56
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0"
cd "$folder"
venv/bin/python - <<'PYTHON'
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=2))
folder = Path(tempfile.mkdtemp(dir="."))
model.save_pretrained(folder)
saved = {}
for name, weight in load_file(folder / "model.safetensors").items():
    if weight.ndim == 2 and "proj" in name:  # as modelopt writes them: a scale for each tensor
        scale = weight.abs().max() / 448
        saved[name], saved[f"{name}_scale"] = (weight / scale).to(torch.float8_e4m3fn), scale.reshape(())
    else:
        saved[name] = weight
save_file(saved, folder / "model.safetensors", {"format": "pt"})
config = json.loads((folder / "config.json").read_text())
config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
(folder / "config.json").write_text(json.dumps(config))
loaded, about = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
before, after = (m.model.layers[0].self_attn.q_proj.weight.abs().max().item() for m in (model, loaded))
print(f"largest weight saved: {before:.4f}")
print(f"largest weight loaded: {after:.1f}")
print(f"missing {len(about['missing_keys'])}, unexpected {len(about['unexpected_keys'])}")
sys.exit(not (after == 448 and before < 1 and not about["missing_keys"]))
PYTHON
