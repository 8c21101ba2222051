"""Models that Transformers or Accelerate has sharded, for `torchrun`: each way, a foreign record is replayed.

What the experts executed is seen by hooks on them; logits and gradients are compared with those of one process.

Legend: B batch, T tokens of a sequence, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from oracles import as_sets, foreign_record, stacked
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from trl_r3 import RouterReplay
from trl_r3.cli.experts import executed_ids

KINDS = {
    "tp": {"tp_size": 2},
    "ep and tp": {"tp_size": 2, "ep_size": 2},
    "fsdp": {"fsdp_size": 2},
    "ep over fsdp": {"fsdp_size": 2, "ep_size": 2},
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def told_ids() -> torch.Tensor:
    """(4, 12) token ids."""
    return (torch.arange(48).reshape(4, 12) * 7 + 3) % 100 + 10


def router(model) -> torch.nn.Parameter:
    """The weight whose gradient is compared."""
    return model.model.layers[2].mlp.gate.weight


def replayed(model, ids, record, gating: str, call: Callable | None = None, backward=torch.Tensor.backward) -> dict:
    """
    One pass over `ids (B, T)` that replays: live and executed ids, and logits. Gradients are left on the model.

    `call` and `backward` are those of an engine around the model.
    """
    call = call or model
    model.train()
    with RouterReplay(model, gating) as replay:
        with replay.record() as recorded, torch.no_grad():
            call(input_ids=ids)
        with executed_ids(model) as seen, replay.replay(record):
            output = call(input_ids=ids, labels=ids)
        backward(output.loss)
    return {
        "live": recorded.routed_experts,
        "executed": stacked(seen, len(ids)),
        "logits": whole(output.logits).detach(),
    }


def compared(got: dict, record, logits, gradient, expected_gradient) -> dict:
    """What a test asks of a pass: rows, those that live routing changes, wrong ones, and how far figures are off."""
    changed = (as_sets(got["live"]) != as_sets(record)).any(-1)
    return {
        "rows": changed.numel(),
        "live": int(changed.sum()),
        "wrong": int((as_sets(got["executed"]) != as_sets(record)).any(-1).sum()),
        "logits": (got["logits"] - logits).abs().max().item(),
        "gradient": ((gradient - expected_gradient).abs().max() / expected_gradient.abs().max()).item(),
    }


def run(folder: Path, name: str, options: list[str]) -> dict:
    (gating,) = options
    dist.init_process_group("gloo")
    ids = told_ids()
    single = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    with RouterReplay(single) as replay:
        record = foreign_record(replay, *ids.shape)
    expected = replayed(single, ids, record, "intercept")
    report = {}
    for kind, sizes in KINDS.items():
        model = AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float32, distributed_config=DistributedConfig(**sizes)
        )
        # ranks that shard the data see their own half of the batch
        parts = sizes.get("fsdp_size", 1)
        own = slice(None) if parts == 1 else slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        got = replayed(model, ids[own], record[own], gating)
        report[kind] = compared(
            got, record[own], expected["logits"][own], whole(router(model).grad), router(single).grad
        )
    return report
