"""The same model bare, with adapters of every kind, and prepared by Accelerate."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from oracles import (
    CHECKPOINTING,
    as_sets,
    changed_rows,
    differing,
    foreign_record,
    gradients,
    stacked,
    use_checkpointing,
)
from peft import LoraConfig, get_peft_model

from trl_r3 import RouterReplay, disable_routing_replay, enable_routing_replay
from trl_r3.cli.experts import executed_ids

ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
    "everything": {
        "target_modules": "all-linear",
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    },
    "saved router": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
}


def with_adapters(model, adapters):
    """Adapters that do something, so that a forward without them is another one."""
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **ADAPTERS[adapters]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p += 0.5 * torch.randn_like(p)
    return model


@pytest.fixture(params=ADAPTERS)
def adapted(qwen, request):
    return with_adapters(qwen, request.param)


def backward(model, ids, **kwargs):
    out = model(ids, labels=ids, **kwargs)
    out.loss.backward()
    return out.logits.detach(), gradients(model)


def is_router(name):
    return ".gate." in name


def test_record_and_replay(adapted, ids):
    logits, grads = backward(adapted, ids)
    replay = enable_routing_replay(adapted)
    assert replay.moe_layers == [1, 3] and (replay.num_experts, replay.top_k) == (8, 2)
    with torch.no_grad(), executed_ids(adapted) as seen, replay.record() as recorded:
        adapted(ids)
    live = stacked(seen, 2)
    assert torch.equal(as_sets(recorded.routed_experts), as_sets(live))
    own_logits, own_grads = backward(adapted, ids, routed_experts=recorded.routed_experts)
    assert torch.equal(own_logits, logits) and differing(own_grads, grads) == []
    record = foreign_record(replay, *ids.shape)
    assert changed_rows(live, record).any()
    with executed_ids(adapted) as seen:
        other_logits, other_grads = backward(adapted, ids, routed_experts=record)
    assert torch.equal(stacked(seen, 2), record)
    assert not torch.equal(other_logits, logits) and differing(other_grads, grads) != []
    disable_routing_replay(adapted)
    again_logits, again_grads = backward(adapted, ids)
    assert torch.equal(again_logits, logits) and differing(again_grads, grads) == []


@pytest.mark.parametrize("kind", CHECKPOINTING[1:])
def test_checkpointing(adapted, ids, kind):
    adapted.enable_input_require_grads()
    use_checkpointing(adapted, "none")
    _, live = backward(adapted, ids)
    replay = enable_routing_replay(adapted)
    record = foreign_record(replay, *ids.shape)
    _, without = backward(adapted, ids, routed_experts=record)
    assert differing(without, live, rtol=1e-3) != []
    use_checkpointing(adapted, kind)
    with executed_ids(adapted) as seen:
        _, grads = backward(adapted, ids, routed_experts=record)
    assert all(torch.equal(stacked(seen, 2, call), record) for call in (0, 1))
    assert differing(grads, without) == []


def test_reference_pass_is_live(adapted, ids):
    """The same module with its adapters off: the pass is told apart, not the model."""
    with torch.no_grad(), adapted.disable_adapter():
        reference = adapted(ids).logits
    replay = enable_routing_replay(adapted)
    record = foreign_record(replay, *ids.shape)
    loss = adapted(ids, labels=ids, routed_experts=record).loss
    for grad in (False, True):
        with torch.set_grad_enabled(grad), executed_ids(adapted) as seen, adapted.disable_adapter():
            assert torch.equal(adapted(ids).logits, reference)
        assert changed_rows(stacked(seen, 2), record).any()
    loss.backward()
    grads = gradients(adapted)
    assert differing(backward(adapted, ids, routed_experts=record)[1], grads) == []


@pytest.mark.parametrize("adapters", ["router", "saved router", "everything"])
def test_router_adapter_learns(qwen, ids, adapters):
    model = with_adapters(qwen, adapters)
    replay = enable_routing_replay(model)
    record = foreign_record(replay, *ids.shape)
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and is_router(n)}
    assert trained
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        with executed_ids(model) as seen:
            model(ids, labels=ids, routed_experts=record).loss.backward()
        assert torch.equal(stacked(seen, 2), record)
        optimizer.step()
        optimizer.zero_grad()
    assert not [n for n, p in model.named_parameters() if n in trained and torch.equal(p, trained[n])]


def test_generate(adapted, padded):
    ids, mask = padded
    untouched = copy.deepcopy(adapted)
    enable_routing_replay(adapted)
    out = adapted.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_routed_experts=True,
    )
    real = torch.cat([mask, torch.ones(3, 6, dtype=mask.dtype)], 1)
    with executed_ids(untouched) as seen, torch.no_grad():
        untouched(out.sequences, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp(min=0))
    fed = real.bool()
    fed[:, -1] = False
    assert not changed_rows(stacked(seen, 3), out.routed_experts)[fed].any()
    assert torch.equal((out.routed_experts[..., 0, 0] != -1), fed)


def test_adapters_added_to_an_enabled_model(qwen, ids):
    replay = enable_routing_replay(qwen)
    record = foreign_record(replay, *ids.shape)
    model = with_adapters(qwen, "everything")
    live = model(ids).logits
    with executed_ids(model) as seen:
        assert not torch.equal(model(ids, routed_experts=record).logits, live)
    assert torch.equal(stacked(seen, 2), record)
    disable_routing_replay(qwen)
    assert torch.equal(model(ids).logits, live)


def test_adapters_merged_under_an_enabled_model(qwen, ids):
    model = with_adapters(qwen, "attention")
    replay = RouterReplay(model)
    record = foreign_record(replay, *ids.shape)
    merged = model.merge_and_unload()
    with executed_ids(merged) as seen, replay.replay(record):
        merged(ids)
    assert torch.equal(stacked(seen, 2), record)
    replay.remove()
    assert not any("forward" in vars(module) for module in merged.modules())


# Accelerate


@pytest.fixture(params=["no", "bf16"])
def accelerator(request):
    yield Accelerator(cpu=True, mixed_precision=request.param)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.mark.parametrize("order", ["enable, prepare", "prepare, enable", "prepare, enable unwrapped"])
@pytest.mark.parametrize("adapters", [None, "attention"])
def test_prepared_by_accelerate(qwen, ids, accelerator, order, adapters):
    model = qwen if adapters is None else with_adapters(qwen, adapters)
    untouched = accelerator.prepare(copy.deepcopy(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if order == "enable, prepare":
        replay = enable_routing_replay(enabled := model)
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
        enabled = model if order == "prepare, enable" else accelerator.unwrap_model(model)
        replay = enable_routing_replay(enabled)
    record = foreign_record(replay, *ids.shape)
    live = untouched(ids).logits
    assert torch.equal(model(ids).logits, live)
    with executed_ids(model) as seen:
        out = model(ids, labels=ids, routed_experts=record)
    assert torch.equal(stacked(seen, 2), record) and not torch.equal(out.logits, live)
    accelerator.backward(out.loss)
    assert gradients(model)
    assert torch.equal(model(ids).logits, live)
    disable_routing_replay(enabled)
    assert torch.equal(model(ids).logits, live)
    assert differing(backward(model, ids)[1], backward(untouched, ids)[1]) == []


@pytest.mark.parametrize("first", ["enable", "prepare"])
def test_accelerate_takes_its_autocast_off(qwen, ids, accelerator, first):
    """`keep_fp32_wrapper=False` makes whatever forward the model has a method of it."""
    model = qwen
    for step in [first, *({"enable", "prepare"} - {first})]:
        if step == "enable":
            replay = enable_routing_replay(model)
        else:
            model = accelerator.prepare(model)
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    record = foreign_record(replay, *ids.shape)
    with executed_ids(unwrapped) as seen:
        unwrapped(ids, routed_experts=record)
    assert torch.equal(stacked(seen, 2), record)
    disable_routing_replay(unwrapped)
    with executed_ids(unwrapped) as seen:
        unwrapped(ids)
    assert not torch.equal(stacked(seen, 2), record)
    RouterReplay(unwrapped).remove()
