"""Models whose weights are elsewhere, or spread over processes.

Legend: B batch, T tokens of a sequence, L MoE layers, K experts per token.
"""

from __future__ import annotations

import accelerate
import pytest
import torch
from oracles import as_sets, foreign_record, stacked
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from trl_r3 import RouterReplay, UnsupportedRouterError
from trl_r3.cli.experts import executed_ids
from trl_r3.routers import discovery


def offload_to_cpu(model, folder):
    return accelerate.cpu_offload(model)


def offload_to_disk(model, folder):
    return accelerate.disk_offload(model, str(folder))


def load_to_disk(model, folder):
    model.save_pretrained(folder / "model")
    return AutoModelForCausalLM.from_pretrained(
        folder / "model",
        dtype=torch.float32,
        device_map={"model": "disk", "lm_head": "cpu"},
        offload_folder=str(folder / "offloaded"),
    )


@pytest.mark.parametrize("offload", [offload_to_cpu, offload_to_disk, load_to_disk])
def test_weights_that_hooks_fetch_are_no_reason_to_refuse(qwen, ids, tmp_path, offload):
    with RouterReplay(qwen) as replay:
        record = foreign_record(replay, *ids.shape)
        with replay.replay(record), torch.no_grad():
            expected = qwen(ids).logits
    model = offload(qwen, tmp_path)
    assert model.get_input_embeddings().weight.is_meta
    with torch.no_grad(), RouterReplay(model) as replay:
        live = model(ids).logits
        with replay.replay(record), executed_ids(model) as seen:
            replayed = model(ids).logits
    assert torch.equal(as_sets(stacked(seen, len(ids))), as_sets(record))
    assert torch.equal(replayed, expected) and not torch.equal(replayed, live)


def test_weights_that_nothing_fetches_are_refused(qwen):
    text = r"not on this process \(device meta, \d+ elements of the embedding\) and no hook fetches them"
    with pytest.raises(UnsupportedRouterError, match=f"{text}.* after `accelerator.prepare`"):
        RouterReplay(qwen.to("meta"))


def test_empty_weights_are_refused(qwen):
    """As ZeRO-3 leaves them before it has prepared a model."""
    for parameter in qwen.parameters():
        parameter.data = torch.empty(0)
    with pytest.raises(UnsupportedRouterError, match=r"\(device cpu, 0 elements of the embedding\)"):
        RouterReplay(qwen)


def test_stages_of_a_pipeline_are_refused_by_name(qwen):
    RouterReplay(qwen).remove()
    qwen.config.distributed_config = DistributedConfig(pp_size=2)
    with pytest.raises(UnsupportedRouterError, match="split into 2 stages by pipeline parallelism.*pp_size=1"):
        RouterReplay(qwen)
    qwen.config.distributed_config = DistributedConfig(tp_size=2)
    RouterReplay(qwen).remove()
    qwen.hf_split_points = ["model.layers.1", "model.layers.2"]  # what Accelerate's `prepare_pippy` leaves
    with pytest.raises(UnsupportedRouterError, match="split into 3 stages"):
        RouterReplay(qwen)


def test_a_check_that_fails_lets_the_forward_end(qwen, monkeypatch):
    """With sharded weights other processes go on to gather those of later layers, and would wait for this one."""
    ran = []
    for index, layer in enumerate(qwen.model.layers):
        layer.register_forward_hook(lambda module, args, output, index=index: ran.append(index))
    failing = discovery.check_router

    def check(router, *args, **kwargs):
        if router.layer == 1:
            raise UnsupportedRouterError("the check failed here")
        return failing(router, *args, **kwargs)

    monkeypatch.setattr(discovery, "check_router", check)
    with pytest.raises(UnsupportedRouterError, match="the check failed here"):
        RouterReplay(qwen)
    assert ran == list(range(len(qwen.model.layers))) * 2
    assert not any("forward" in vars(module) for module in qwen.modules())
