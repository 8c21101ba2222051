"""A model whose every weight ZeRO-3 has partitioned, for `torchrun`: a foreign record is replayed.

DeepSpeed keeps weights of fewer than 100,000 elements whole by default, so that small models need a threshold of 0.

Legend: B batch, T tokens of a sequence, L MoE layers, K experts per token.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from deepspeed.utils import safe_get_full_grad
from oracles import as_sets, executed_ids, foreign_record, stacked
from transformers import AutoModelForCausalLM

from trl_r3 import RouterReplay

ZERO3 = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def router(model) -> torch.nn.Parameter:
    return model.model.layers[2].mlp.gate.weight


def replayed(model, call: Callable, backward: Callable, ids, record, gating: str):
    """One pass over `ids (B, T)` that replays: live and executed ids, and logits."""
    with RouterReplay(model, gating) as replay:
        with replay.record() as recorded, torch.no_grad():
            call(input_ids=ids)
        with executed_ids(model) as seen, replay.replay(record):
            output = call(input_ids=ids, labels=ids)
        backward(output.loss)
    return recorded.routed_experts, stacked(seen, len(ids)), output.logits.detach()


def main(folder: Path, gating: str) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    ids = (torch.arange(48).reshape(4, 12) * 7 + 3) % 100 + 10
    single, sharded = (AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32) for _ in range(2))
    with RouterReplay(single) as replay:
        record = foreign_record(replay, *ids.shape)
    _, _, logits = replayed(single.train(), single, torch.Tensor.backward, ids, record, "intercept")
    engine, *_ = deepspeed.initialize(
        model=sharded.train(), config=ZERO3, optimizer=torch.optim.SGD(sharded.parameters(), lr=0.1)
    )
    own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    elements = router(sharded).numel()
    live, executed, sharded_logits = replayed(engine.module, engine, engine.backward, ids[own], record[own], gating)
    gradient, expected = safe_get_full_grad(router(sharded)), router(single).grad
    changed = (as_sets(live) != as_sets(record[own])).any(-1)
    report = {
        "elements": elements,
        "rows": changed.numel(),
        "live": int(changed.sum()),
        "wrong": int((as_sets(executed) != as_sets(record[own])).any(-1).sum()),
        "logits": (sharded_logits - logits[own]).abs().max().item(),
        "gradient": ((gradient - expected).abs().max() / expected.abs().max()).item(),
    }
    (folder / f"zero3-{gating}-rank{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
