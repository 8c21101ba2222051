#!/usr/bin/env bash
# Trainer.train(resume_from_checkpoint=...) with a mixture of experts
#
# Versions: Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0, accelerate 1.15.0.
# Expected: a run that resumes begins with the weights of its checkpoint, as `from_pretrained` reads them.
# Behaviour: a checkpoint holds each expert by itself, the model all of a layer in one tensor. `from_pretrained` joins
# them; resuming does not, warns of missing and unexpected names, and trains on with the experts that the model was
# built with beside the attention of the checkpoint. The same happens in `load_best_model_at_end`.
# Output seen:
#     from_pretrained: attention as saved True, experts as saved True
#     resumed: attention as saved True, experts as saved False, experts as built True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0"
cd "$folder"
venv/bin/python - 2> /dev/null <<'PYTHON'
import sys

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
config = Qwen3MoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=2)
data = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(8)]
ATTENTION, EXPERTS = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.gate_up_proj"


def built():
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config)


def train(model, **resume):
    common = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 4}
    settings = {"output_dir": "run", "max_steps": 2, "save_steps": 2, "learning_rate": 1e-2}
    Trainer(model, TrainingArguments(**settings, **common), train_dataset=data).train(**resume)


def same(model, other, name):
    return torch.equal(model.state_dict()[name], other.state_dict()[name])


trained = built()
train(trained)
loaded = Qwen3MoeForCausalLM.from_pretrained("run/checkpoint-2")
resumed = built()
train(resumed, resume_from_checkpoint="run/checkpoint-2")  # no step is left to train
found = [same(loaded, trained, ATTENTION), same(loaded, trained, EXPERTS)]
print(f"from_pretrained: attention as saved {found[0]}, experts as saved {found[1]}")
found += [same(resumed, trained, ATTENTION), same(resumed, trained, EXPERTS), same(resumed, built(), EXPERTS)]
print(f"resumed: attention as saved {found[2]}, experts as saved {found[3]}, experts as built {found[4]}")
sys.exit(found != [True, True, True, False, True])
PYTHON
