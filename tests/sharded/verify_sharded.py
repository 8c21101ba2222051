"""`trl-r3 verify` in a process of a launch, which leaves what it printed and what it held of the first router.

Options: a rank whose routes are moved by a token or `none`, and those of `trl-r3`.

Legend: E experts, H hidden size.
"""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from trl_r3.cli import verify
from trl_r3.cli.command import main


def watch(spoiled: int | None, patch: pytest.MonkeyPatch) -> dict[str, Any]:
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

    patch.setattr(verify, "sample", watched)
    return held


def run(folder: Path, name: str, options: list[str]) -> dict[str, Any]:
    """Its status, what it printed, and what the process held."""
    spoiled, *arguments = options
    state = PartialState(cpu=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.distributed_type = DistributedType.MULTI_GPU  # Accelerate reads settings of FSDP beside GPUs only
    printed, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(errors):
        held = watch(int(spoiled) if spoiled != "none" else None, patch)
        status = main(arguments)
    return {"status": status, "printed": printed.getvalue(), "errors": errors.getvalue(), **held}
