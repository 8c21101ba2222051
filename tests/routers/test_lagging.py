"""A selection that lags: by router weights some steps old, in forward and recompute; lag 0 is plain training."""

from __future__ import annotations

import copy

import pytest
import torch
from engines.tiny_chat import tiny_qwen3_moe
from oracles import CHECKPOINTING, as_sets, stacked, use_checkpointing

from trl_r3 import disable_routing_replay, enable_routing_replay
from trl_r3.cli.experts import executed_ids
from trl_r3.routers.lagging import OlderRouters
from trl_r3.routers.router import Router

STEPS = 4
IDS = torch.randint(4, 120, (2, 12), generator=torch.Generator().manual_seed(0))


def gates(model):
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def trained(model, kind, accumulate=1):
    """Losses, and by step: what experts executed in each call, the routers' inputs, and a copy of their weights."""
    use_checkpointing(model, kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    steps = []
    for _ in range(STEPS):
        kept, inputs = [gate.weight.detach().clone() for gate in gates(model)], []

        def note(module, args, inputs=inputs):
            inputs.append(args[0].detach().clone())

        handles = [gate.register_forward_pre_hook(note) for gate in gates(model)]
        with executed_ids(model) as seen:
            for _ in range(accumulate):
                loss = model(IDS, labels=IDS, use_cache=False).loss
                loss.backward()
        for handle in handles:
            handle.remove()
        calls = [stacked(seen, 2, call).flatten(0, 1) for call in range(len(next(iter(seen.values()))))]
        steps.append((loss.item(), calls, inputs[: len(kept)], kept))
        optimizer.step()
        optimizer.zero_grad()
    return steps


def selected(inputs, weights):
    """(N, L, K): by hand, what router weights select from the hidden states that reached the routers."""
    return torch.stack([(x.flatten(0, -2) @ w.T).topk(4).indices for x, w in zip(inputs, weights, strict=True)], 1)


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("lag", [1, 2])
def test_the_selection_is_that_of_a_kept_copy(kind, lag):
    model = tiny_qwen3_moe()
    enable_routing_replay(model, lag=lag)
    steps = trained(model, kind)
    assert {len(calls) for _, calls, _, _ in steps} == {1 if kind == "none" else 2}
    changed = 0
    for at, (_, calls, inputs, now) in enumerate(steps):
        kept = steps[max(at - lag, 0)][3]
        for executed in calls:
            assert torch.equal(as_sets(executed), as_sets(selected(inputs, kept)))
        changed += int((as_sets(calls[0]) != as_sets(selected(inputs, now))).any(-1).sum())
    assert changed > 20, "the routers of now select the same, which shows nothing"


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_lag_0_is_plain_training(kind):
    plain, model = tiny_qwen3_moe(), tiny_qwen3_moe()
    enable_routing_replay(model, lag=0)
    expected = [loss for loss, *_ in trained(plain, kind)]
    assert [loss for loss, *_ in trained(model, kind)] == expected
    weights = plain.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def other_weights(model):
    """What a run of another seed would have, of the whole model."""
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(each.shape, generator=generator) for name, each in model.state_dict().items()}


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("lag", [None, 2, 0])
def test_given_weights_select(kind, lag):
    """Always, or until so many steps were taken; never where nothing lags."""
    model = tiny_qwen3_moe()
    older = other_weights(model)
    names = [name for name in older if name.endswith("mlp.gate.weight")]
    enable_routing_replay(model, route_with=older, lag=lag)
    steps = trained(model, kind)
    differ = 0
    for at, (_, calls, inputs, now) in enumerate(steps):
        given = [older[name] for name in names]
        of_lag = given if at < (lag or 0) else steps[max(at - (lag or 0), 0)][3]
        expected = as_sets(selected(inputs, given if lag is None else of_lag))
        assert all(torch.equal(as_sets(executed), expected) for executed in calls)
        differ += int((expected != as_sets(selected(inputs, now))).any(-1).sum())
    assert (differ > 20) == (lag != 0)


def test_given_weights_are_read_when_they_select():
    """An average that is updated in place."""
    model = tiny_qwen3_moe()
    older = other_weights(model)
    enable_routing_replay(model, route_with=older)
    with executed_ids(model) as seen:
        model(IDS, labels=IDS, use_cache=False)
        for each in older.values():
            each.neg_()
        model(IDS, labels=IDS, use_cache=False)
    before, after = (as_sets(stacked(seen, 2, call)) for call in (0, 1))
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda each: None, "has nothing for"),
        (lambda each: each[:2], r"has a tensor of shape \(2, .*which is of shape"),
    ],
)
def test_weights_of_other_routers_are_refused(spoil, message):
    model = tiny_qwen3_moe()
    older = other_weights(model)
    name = next(name for name in older if name.endswith("mlp.gate.weight"))
    older[name] = spoil(older[name])
    with pytest.raises(ValueError, match=f"`route_with` {message}"):
        enable_routing_replay(model, route_with=older)
    enable_routing_replay(model)  # nothing was left behind


@pytest.mark.parametrize("lag", [None, 2])
def test_weights_of_the_model_itself_are_refused(lag):
    """`state_dict()` copies nothing, so that they would never be older than those of now."""
    model = tiny_qwen3_moe()
    with pytest.raises(ValueError, match="of the model itself, as `model.state_dict.*Pass copies"):
        enable_routing_replay(model, route_with=model.state_dict(), lag=lag)
    enable_routing_replay(model, route_with=copy.deepcopy(model.state_dict()), lag=lag)


def test_an_average_is_kept_in_more_bits_than_the_model_has():
    model = tiny_qwen3_moe().to(torch.bfloat16)
    older = other_weights(model)
    assert {each.dtype for each in older.values()} == {torch.float32}
    enable_routing_replay(model, route_with=older)
    _, calls, inputs, now = trained(model, "non_reentrant")[-1]
    given = [each.to(torch.bfloat16) for name, each in older.items() if name.endswith("mlp.gate.weight")]
    assert all(torch.equal(as_sets(executed), as_sets(selected(inputs, given))) for executed in calls)
    assert not torch.equal(as_sets(calls[0]), as_sets(selected(inputs, now)))


def test_a_router_that_is_sharded_later_is_refused():
    """As by a trainer, which prepares the model after it was enabled."""
    model = tiny_qwen3_moe()
    enable_routing_replay(model, lag=1)
    model(IDS, labels=IDS, use_cache=False)
    gate = gates(model)[1]
    gate.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    with pytest.raises(ValueError, match="weight of .*gate is sharded, so no process holds the weights"):
        model(IDS, labels=IDS, use_cache=False)


def test_a_step_is_told_by_the_weights_and_not_by_forwards():
    """Micro-batches of one step share the selection of one copy."""
    model = tiny_qwen3_moe()
    enable_routing_replay(model, lag=1)
    steps = trained(model, "none", accumulate=3)
    for at, (_, calls, inputs, _) in enumerate(steps):
        assert len(calls) == 3
        for executed in calls:
            assert torch.equal(as_sets(executed), as_sets(selected(inputs, steps[max(at - 1, 0)][3])))


def test_the_model_keeps_its_weights_and_is_given_back():
    model = tiny_qwen3_moe()
    own = {name: id(value) for name, value in model.named_parameters()}
    enable_routing_replay(model, lag=3)
    model.train()(IDS, labels=IDS).loss.backward()
    assert {name: id(value) for name, value in model.named_parameters()} == own
    assert all(gate.weight.grad is not None for gate in gates(model))
    with torch.no_grad():
        live = model.eval()(IDS).logits
    disable_routing_replay(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, live), "without a graph it routes live"


@pytest.mark.parametrize("lag", [1, 2])
def test_steps_that_pytorch_does_not_count(lag):
    """Optimizers that write into `data`, as DeepSpeed does, or through a kernel."""
    model = tiny_qwen3_moe()
    replay = enable_routing_replay(model, lag=lag)
    kept = []
    for step in range(4):
        kept.append([gate.weight.detach().clone() for gate in gates(model)])
        versions = [gate.weight._version for gate in gates(model)]
        for _ in range(2):  # micro-batches
            model(IDS, labels=IDS, use_cache=False)
            older = replay.steady_pass.keywords["older"]
            for index, expected in enumerate(kept[max(step - lag, 0)]):
                with older.at_work(index):
                    assert torch.equal(gates(model)[index].weight, expected)
        for gate in gates(model):
            gate.weight.data.add_(torch.randn(gate.weight.shape))
        assert versions == [gate.weight._version for gate in gates(model)]


@pytest.mark.parametrize("given", [{"lag": "2"}, {"lag": 1.5}, {"route_with": 3}, {"route_with": [1]}])
def test_nothing_stays_of_what_is_no_lag(given):
    model = tiny_qwen3_moe()
    with pytest.raises((TypeError, AttributeError)):
        enable_routing_replay(model, **given)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_negative_lag_is_refused():
    model = tiny_qwen3_moe()
    with pytest.raises(ValueError, match="`lag` is -1, but it counts optimizer steps back"):
        enable_routing_replay(model, lag=-1)
    enable_routing_replay(model)  # nothing was left on it


def test_a_router_beside_its_experts_is_refused():
    """Its older weights would be a copy of the experts for each step."""
    block = torch.nn.Module()
    block.experts = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="selects in the module that holds the experts"):
        OlderRouters([Router("block", block, 0, 8, 2, 0, None)], 1)


def test_a_router_without_its_weights_is_refused():
    gate = torch.nn.Linear(2, 2, bias=False)
    gate.weight = torch.nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it
    with pytest.raises(ValueError, match="weight of gate is sharded"):
        OlderRouters([Router("gate", gate, 0, 8, 2, 0, None)], 1)
