"""Models whose weights are elsewhere, and a forward of a few tokens that fails.

Legend: B batch, T tokens of a sequence, L MoE layers, K experts per token.
"""

from __future__ import annotations

import accelerate
import pytest
import torch
from model_zoo import build_tiny
from oracles import as_sets, foreign_record, stacked
from routers.left_behind import Stop, same_traces, traces
from transformers import AutoModelForCausalLM

from trl_r3 import RouterReplay, UnsupportedRouterError
from trl_r3.cli.experts import executed_ids


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


def test_meta_weights_are_refused():
    with torch.device("meta"):
        model = type(build_tiny("mixtral"))(build_tiny("mixtral").config)
    with pytest.raises(UnsupportedRouterError, match="meta"):
        RouterReplay(model)


@pytest.mark.parametrize("hook", ["forward", "pre-forward"])
def test_failing_probe_leaves_nothing(qwen, ids, hook):
    def stop(*args):
        raise Stop

    before = traces(qwen)
    layer = qwen.model.layers[1]
    handle = layer.register_forward_hook(stop) if hook == "forward" else layer.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        RouterReplay(qwen)
    handle.remove()
    assert same_traces(traces(qwen), before)
