#!/usr/bin/env bash
# How much of the auxiliary loss Trainer trains with, by how it splits a batch
#
# Versions: Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0, accelerate 1.15.0.
# Expected: `router_aux_loss_coef` means the same however a batch of eight is split, as the language-model loss does, and
# with label smoothing, too.
# Behaviour: Trainer divides the loss of tokens by the tokens of the whole batch and leaves the auxiliary loss, which the
# model has added, as it is: its gradient is multiplied by gradient_accumulation_steps, and by the number of processes
# with the default average_tokens_across_devices. With label_smoothing_factor the loss is computed anew, without it.
# Output seen: the gradient of the auxiliary loss at the router, over that of one batch of eight
#     1 process, 8 x 1: 1.00
#     1 process, 1 x 8 (gradient_accumulation_steps): 8.00
#     1 process, 8 x 1 with label_smoothing_factor=0.1: 0.00
#     2 processes, 4 x 1: 2.00
#     2 processes, 1 x 4 (gradient_accumulation_steps): 8.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0" "accelerate==1.15.0"
cd "$folder"
cat > measure.py <<'PYTHON'
import json
import os
import sys

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
routing = {"num_experts": 8, "num_experts_per_tok": 2, "output_router_logits": True}
data = [{"input_ids": list(range(8)), "labels": list(range(8))} for _ in range(8)]


def moved(coef, rows, steps, **settings):
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **routing, router_aux_loss_coef=coef))
    router = model.model.layers[0].mlp.gate.weight
    own = router.detach().clone()
    split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps, "max_steps": 1}
    sgd = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    quiet = {"output_dir": "run", "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    Trainer(model, TrainingArguments(**split, **sgd, **quiet, **settings, use_cpu=True), train_dataset=data).train()
    return own - router.detach()


for case in json.loads(sys.argv[1]):
    size = (moved(1.0, **case) - moved(0.0, **case)).norm().item()
    if os.environ.get("RANK", "0") == "0":
        print("of the router:", size)
PYTHON
sizes() { venv/bin/python measure.py "$1" 2> "errors.${RANK:-0}" | sed -n 's/^of the router: //p'; }
smoothed='{"rows": 8, "steps": 1, "label_smoothing_factor": 0.1}'
sizes "[{\"rows\": 8, \"steps\": 1}, {\"rows\": 1, \"steps\": 8}, $smoothed]" > found
export MASTER_ADDR=127.0.0.1 WORLD_SIZE=2
MASTER_PORT=$(venv/bin/python -c "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])")
export MASTER_PORT
split='[{"rows": 4, "steps": 1}, {"rows": 1, "steps": 4}]'
RANK=1 LOCAL_RANK=1 sizes "$split" &
RANK=0 LOCAL_RANK=0 sizes "$split" >> found
wait
venv/bin/python - <<'PYTHON'
import sys

split = "(gradient_accumulation_steps)"
labels = ["8 x 1", f"1 x 8 {split}", "8 x 1 with label_smoothing_factor=0.1", "4 x 1", f"1 x 4 {split}"]
sizes = [float(line) for line in open("found")]
shares = [size / sizes[0] for size in sizes]
for label, share, processes in zip(labels, shares, ["1 process"] * 3 + ["2 processes"] * 2, strict=True):
    print(f"{processes}, {label}: {share:.2f}")
sys.exit([round(share, 2) for share in shares] != [1, 8, 0, 2, 8])
PYTHON
