"""A model whose every weight ZeRO-3 has partitioned, for `torchrun`: a foreign record is replayed.

DeepSpeed keeps weights of fewer than 100,000 elements whole by default, so that small models need a threshold of 0.
"""

from __future__ import annotations

from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from oracles import foreign_record
from sharded.attach_sharded import compared, replayed, router, told_ids
from transformers import AutoModelForCausalLM

from trl_r3 import RouterReplay

ZERO3 = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def run(folder: Path, name: str, options: list[str]) -> dict:
    (gating,) = options
    deepspeed.init_distributed("gloo")
    ids = told_ids()
    single, sharded = (AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32) for _ in range(2))
    with RouterReplay(single) as replay:
        record = foreign_record(replay, *ids.shape)
    expected = replayed(single, ids, record, "intercept")
    engine, *_ = deepspeed.initialize(
        model=sharded, config=ZERO3, optimizer=torch.optim.SGD(sharded.parameters(), lr=0.1)
    )
    own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    elements = router(sharded).numel()
    fetching = engine.optimizer.parameter_offload.get_param_coordinator()
    with torch.no_grad():
        for _ in range(2):
            engine.module(ids[own])
    traced = fetching.is_complete_trace()  # of forwards, by which it fetches ahead
    RouterReplay(engine.module).remove()
    forgotten = traced and fetching.is_invalid_trace()
    got = replayed(engine.module, ids[own], record[own], gating, engine, engine.backward)
    gradient = safe_get_full_grad(router(sharded))
    report = compared(got, record[own], expected["logits"][own], gradient, router(single).grad)
    engine.destroy()
    return {"elements": elements, "forgotten": forgotten, **report}
