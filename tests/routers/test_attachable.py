"""What nothing can be attached to: no model, a compiled one, one that is attached, stages of a pipeline."""

from __future__ import annotations

import accelerate
import pytest
import torch
from oracles import foreign_record, stacked
from transformers.distributed import DistributedConfig

from trl_r3 import RouterReplay, UnsupportedRouterError, enable_routing_replay
from trl_r3.cli.experts import executed_ids


def test_attaching_twice_is_refused(qwen, ids):
    replay = RouterReplay(qwen)
    with pytest.raises(ValueError, match="already"):
        enable_routing_replay(qwen)
    with replay.replay(record := foreign_record(replay, *ids.shape)), executed_ids(qwen) as seen:
        qwen(ids)
    assert torch.equal(stacked(seen, 2), record)
    replay.remove()
    RouterReplay(qwen).remove()


def test_compiled_model_is_refused(qwen):
    with pytest.raises(ValueError, match="compiled"):
        RouterReplay(torch.compile(qwen))
    qwen.compile()
    with pytest.raises(ValueError, match="compiled"):
        RouterReplay(qwen)


def test_what_is_no_model(tmp_path):
    with pytest.raises(TypeError, match="the model is a str"):
        enable_routing_replay(str(tmp_path))


def test_what_is_no_transformers_model(qwen):
    for module in (qwen.lm_head, qwen.model.layers[1], torch.nn.Sequential(qwen)):
        with pytest.raises(TypeError, match=f"{type(module).__name__} has no `get_input_embeddings`"):
            RouterReplay(module)
    RouterReplay(qwen.model).remove()


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


def test_copies_on_several_devices_are_refused(qwen):
    parallel = torch.nn.DataParallel(qwen)  # on a machine without a GPU it is the model itself
    RouterReplay(parallel).remove()
    parallel.device_ids = [0, 1]
    with pytest.raises(UnsupportedRouterError, match="copies Qwen3MoeForCausalLM to 2 devices in each forward"):
        RouterReplay(parallel)


def test_what_a_library_put_back_after_removal_is_no_attachment(qwen, ids):
    """Hooks of Accelerate keep the forward that was there when they came, and put it back when they go."""
    live = qwen(ids).logits
    replay = RouterReplay(qwen)
    accelerate.cpu_offload(qwen, execution_device="cpu")
    replay.remove()
    accelerate.hooks.remove_hook_from_submodules(qwen)
    assert torch.equal(qwen(ids).logits, live)
    with RouterReplay(qwen) as again:
        record = foreign_record(again, *ids.shape)
        with executed_ids(qwen) as seen, torch.no_grad(), again.replay(record):
            qwen(ids)
    assert torch.equal(stacked(seen, 2), record)
    assert torch.equal(qwen(ids).logits, live)
