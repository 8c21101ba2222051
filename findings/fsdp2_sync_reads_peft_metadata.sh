#!/usr/bin/env bash
# What TRL's synchronisation of FSDP2 weights with vLLM asks for each weight: the metadata of PEFT
#
# Versions: Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0, trl 1.16.0, peft 0.21.2, accelerate 1.15.0.
# Expected: whether PEFT is installed is found out once, as it cannot change while a model is sent.
# Behaviour: TRL asks Accelerate for each parameter whether the model is one of PEFT, and Accelerate's answer opens and
# parses the METADATA file of the installed PEFT twice, each time, and that of DeepSpeed where it is installed: 1 to 2 ms
# a parameter on a core of a Xeon, in every process and every synchronisation, for models without adapters, too.
# Output seen:
#     weights: 200, readings of PEFT's metadata: 400
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" "transformers==5.23.0" "trl==1.16.0" "peft==0.21.2" "accelerate==1.15.0"
cd "$folder"
MASTER_ADDR=127.0.0.1 MASTER_PORT=0 RANK=0 WORLD_SIZE=1 venv/bin/python - <<'PYTHON'
import importlib.metadata
import sys
from types import SimpleNamespace

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from trl.generation.vllm_generation import VLLMGeneration

model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(100)))
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
read, own = [], importlib.metadata.metadata


def metadata(name):
    read.append(name)
    return own(name)


importlib.metadata.metadata = metadata
generation = SimpleNamespace(
    _fix_param_name_to_vllm=lambda name, extra_prefixes: name, accelerator=SimpleNamespace(device="cpu")
)
weights = list(VLLMGeneration._iter_fsdp2_params(generation, model))
print(f"weights: {len(weights)}, readings of PEFT's metadata: {read.count('peft')}")
torch.distributed.destroy_process_group()
sys.exit((len(weights), read.count("peft")) != (200, 400))
PYTHON
