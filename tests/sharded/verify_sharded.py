"""`trl-r3 verify` in a process of a launch, which leaves what it printed and what it held of the first router.

Arguments: a folder, a rank whose routes are moved by a token or `none`, and those of `trl-r3`.

Legend: E experts, H hidden size.
"""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from trl_r3.cli import verify
from trl_r3.cli.command import main


def watch(spoiled: int | None) -> dict[str, int]:
    """Note what the process holds when it samples; move the routes of one to the token before theirs."""
    sample, held = verify.sample, {}

    def watched(loaded, *args):
        weight = next(p for name, p in loaded.model.named_parameters() if name.endswith("mlp.gate.weight"))  # (E, H)
        held["elements"] = (weight.to_local() if isinstance(weight, DTensor) else weight).numel()
        held["whole"] = loaded.model.config.num_experts * loaded.model.config.hidden_size
        rollout = sample(loaded, *args)
        held["first prompt"] = list(rollout.prompt_ids[0])
        if PartialState().process_index == spoiled:
            rollout.routes = [torch.cat([ids[1:], ids[-1:]]) for ids in rollout.routes]
        return rollout

    verify.sample = watched
    return held


if __name__ == "__main__":
    folder, spoiled, *arguments = sys.argv[1:]
    held = watch(int(spoiled) if spoiled != "none" else None)
    state = PartialState(cpu=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.distributed_type = DistributedType.MULTI_GPU  # Accelerate reads settings of FSDP beside GPUs only
    torch.set_num_threads(1)
    rank, printed = state.process_index, io.StringIO()
    with redirect_stdout(printed):
        status = main(arguments)
    told = {"status": status, "printed": printed.getvalue(), **held}
    (Path(folder) / f"told-rank{rank}.json").write_text(json.dumps(told))
    # not its status, at which the launcher would end the other process before it has written
    os._exit(0)  # exit handlers aborted in 1 run of 55: PyTorch 2.13 leaves threads to them
