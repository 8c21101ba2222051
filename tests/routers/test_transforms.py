"""`torch.func`: its transforms go through the record that a handle replays, or are refused in a sentence."""

from __future__ import annotations

import pytest
import torch
from oracles import foreign_record
from torch.func import functional_call, grad, jvp

from trl_r3 import RouterReplay, enable_routing_replay


def weights_of(model):
    return {name: weight.detach() for name, weight in model.named_parameters()}


def loss_of(model, weights, ids, **kwargs):
    return functional_call(model, weights, (ids,), {"labels": ids, **kwargs}).loss


def same_gradients(one, model):
    return all(torch.allclose(one[name], each.grad, atol=1e-6) for name, each in model.named_parameters())


@pytest.mark.parametrize("missing", [False, True])
def test_gradients_are_those_of_backward(qwen, ids, missing):
    replay = RouterReplay(qwen)
    record = foreign_record(replay, *ids.shape)
    record[:, 1:2] = record[:, 1:2].masked_fill(torch.tensor(missing), -1)
    with replay.replay(record):
        gradients = grad(lambda weights: loss_of(qwen, weights, ids))(weights_of(qwen))
    live = grad(lambda weights: loss_of(qwen, weights, ids))(weights_of(qwen))
    with replay.replay(record):
        qwen(ids, labels=ids).loss.backward()
    assert same_gradients(gradients, qwen)
    assert not same_gradients(live, qwen)
    gates = [each for name, each in gradients.items() if name.endswith("mlp.gate.weight")]
    assert gates and all(each.abs().sum() > 0 for each in gates)


def test_one_record_for_each_of_a_vmap(qwen, ids):
    replay = RouterReplay(qwen)
    record = foreign_record(replay, 1, ids.shape[1])
    with torch.no_grad(), replay.replay(record):
        together = torch.vmap(lambda each: qwen(each[None]).logits)(ids)
    for logits, each in zip(together, ids, strict=True):
        with torch.no_grad(), replay.replay(record):
            assert torch.allclose(logits, qwen(each[None]).logits, atol=1e-5)


def test_the_argument_is_refused(qwen, ids):
    replay = enable_routing_replay(qwen)
    record, weights = foreign_record(replay, *ids.shape), weights_of(qwen)
    match = r"inside a transform of `torch.func` \({}\).* inside `with replay.replay\(routed_experts\):`"
    with pytest.raises(RuntimeError, match=match.format("grad")):
        grad(lambda weights: loss_of(qwen, weights, ids, routed_experts=record))(weights)
    with pytest.raises(RuntimeError, match=match.format("jvp")):
        jvp(lambda weights: loss_of(qwen, weights, ids, routed_experts=record), (weights,), (weights,))
    with pytest.raises(RuntimeError, match=match.format("vmap")):
        torch.vmap(lambda each, rows: qwen(each[None], routed_experts=rows[None]).logits)(ids, record)
    assert torch.isfinite(loss_of(qwen, weights, ids, routed_experts=record)), "without a transform it is taken"


def test_recording_in_a_vmap_is_refused(qwen, ids):
    refused = pytest.raises(RuntimeError, match=r"`record\(\)` inside `torch.vmap`.* in a forward outside")
    with torch.no_grad(), RouterReplay(qwen).record() as recorded, refused:
        torch.vmap(lambda each: qwen(each[None]).logits)(ids)
    assert not recorded.forwards


def test_the_op_is_refused(qwen, ids):
    replay = RouterReplay(qwen, gating="op")
    with pytest.raises(RuntimeError, match='gating="intercept"'), replay.replay(foreign_record(replay, *ids.shape)):
        grad(lambda weights: loss_of(qwen, weights, ids))(weights_of(qwen))
