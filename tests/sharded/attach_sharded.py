"""Models that Transformers or Accelerate has sharded, for `torchrun`: each way, a foreign record is replayed.

What the experts executed is seen by hooks on them; logits and gradients are compared with those of one process.

Legend: B batch, T tokens of a sequence, L MoE layers, K experts per token.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from oracles import as_sets, executed_ids, foreign_record, stacked
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from trl_r3 import RouterReplay

KINDS = {
    "tp": {"tp_size": 2},
    "ep and tp": {"tp_size": 2, "ep_size": 2},
    "fsdp": {"fsdp_size": 2},
    "ep over fsdp": {"fsdp_size": 2, "ep_size": 2},
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def replayed(model, ids, record, gating: str) -> dict:
    """One pass over `ids (B, T)` that replays: executed ids, logits, loss and the gradient of a router."""
    model.train()
    with RouterReplay(model, gating) as replay:
        with replay.record() as recorded, torch.no_grad():
            model(input_ids=ids)
        with executed_ids(model) as seen, replay.replay(record):
            output = model(input_ids=ids, labels=ids)
        output.loss.backward()
    router = dict(model.named_parameters())["model.layers.2.mlp.gate.weight"]
    gradient, logits = whole(router.grad), whole(output.logits)
    model.zero_grad()
    return {
        "live": recorded.routed_experts,
        "executed": stacked(seen, len(ids)),
        "logits": logits.detach(),
        "gradient": gradient,
    }


def main(folder: Path, gating: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ids = (torch.arange(48).reshape(4, 12) * 7 + 3) % 100 + 10
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
        changed = (as_sets(got["live"]) != as_sets(record[own])).any(-1)
        report[kind] = {
            "rows": changed.numel(),
            "live": int(changed.sum()),
            "wrong": int((as_sets(got["executed"]) != as_sets(record[own])).any(-1).sum()),
            "logits": (got["logits"] - expected["logits"][own]).abs().max().item(),
            "gradient": (
                (got["gradient"] - expected["gradient"]).abs().max() / expected["gradient"].abs().max()
            ).item(),
        }
    (folder / f"attached-{gating}-rank{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
