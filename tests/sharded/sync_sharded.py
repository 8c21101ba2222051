"""A trainer over a bfloat16 base that sends its weights several times: what is sent, and what stays.

For `accelerate launch`. Its updates are those of `train_sharded`, its adapters are on attention or on experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import save_file
from sharded.train_sharded import make_trainer, parse, without_nccl
from trl.generation import vllm_client

SYNCS = 8  # what merging loses, the first of these would lose; one process does it a hundred times


def whole_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """All of the policy, put together from what processes hold, by the names in PEFT."""
    model = extract_model_from_parallel(trainer.model)
    parameters = dict(model.named_parameters())
    with trainer.vllm_generation._dist.gather_params(list(parameters.values())):
        return {name: getattr(p, "full_tensor", lambda p=p: p.data)().clone() for name, p in parameters.items()}


def run(folder: Path, name: str, options: list[str]) -> dict[str, Any]:
    """How many values of the policy all syncs change; the adapter and what was sent last are left in the folder."""
    with pytest.MonkeyPatch.context() as patch:
        without_nccl(patch.setattr)
        trainer = make_trainer(folder, name, parse(options))
        trainer.train()
        sent: list[dict[str, torch.Tensor]] = []

        def update(client, metadata, params):
            sent[:] = [{name: param.clone() for name, param in params}]

        patch.setattr(vllm_client.VLLMClient, "update_named_params", update)
        before = whole_weights(trainer)
        for _ in range(SYNCS):
            trainer.vllm_generation.sync_weights()
        after = whole_weights(trainer)
        trainer.save_model(str(folder / name / "trained"))
        if trainer.accelerator.is_main_process:
            save_file(sent[0], folder / name / "sent.safetensors")
        trainer.accelerator.wait_for_everyone()
        report = {
            "changed": sum(int((value != after[name]).sum()) for name, value in before.items()),
            "compared": sum(value.numel() for value in before.values()),
            "wrong": trainer.wrong,
            "rows": trainer.compared,
        }
        trainer.accelerator.free_memory()  # an engine of DeepSpeed ends when it is told to
        return report
