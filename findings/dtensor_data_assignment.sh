#!/usr/bin/env bash
# Assigning `.data` of a parameter that is a DTensor, as code that merges adapters does
#
# Versions: Python 3.11, torch 2.13.0 (CPU).
# Expected: as with a plain parameter, the parameter then has the new values, or an error says that it cannot.
# Behaviour: nothing happens and nothing is raised: the shards keep the old values. `.data.copy_()` works.
# Output seen:
#     plain parameter after `.data = ones`: [1.0, 1.0, 1.0, 1.0]
#     DTensor parameter after `.data = ones`: [0.0, 0.0, 0.0, 0.0]
#     DTensor parameter after `.data.copy_(ones)`: [1.0, 1.0, 1.0, 1.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.13.0" numpy
cd "$folder"
venv/bin/python - <<'PYTHON'
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
plain = torch.nn.Parameter(torch.zeros(4))
plain.data = torch.ones(4)
sharded = torch.nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
ones = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
sharded.data = ones
after = sharded.full_tensor().tolist()
sharded.data.copy_(ones)
print("plain parameter after `.data = ones`:", plain.tolist())
print("DTensor parameter after `.data = ones`:", after)
print("DTensor parameter after `.data.copy_(ones)`:", sharded.full_tensor().tolist())
sys.stdout.flush()
os._exit(not (after == [0.0] * 4 and sharded.full_tensor().tolist() == plain.tolist() == [1.0] * 4))
PYTHON
