"""The gradient of a replayed layer reaches the record and nothing else, and the auxiliary loss is live."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import InDouble, as_sets, changed_rows, foreign_record, stacked
from routers.blocks import Watched, blocks_of, in_float64, logit_gradients, record_of
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from trl_r3 import RouterReplay
from trl_r3.cli.experts import executed_ids


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_gradient_reaches_the_record_and_nothing_else(model_type, ids):
    model = in_float64(model_type)
    replay = RouterReplay(model)
    record = foreign_record(replay, *ids.shape)
    with InDouble():
        live = record_of(model, replay, ids)
    grad_NE, logits_NE = logit_gradients(model, replay, record, ids)
    slot = replay.moe_layers.index(1)
    record_NK, live_NK = record[:, :, slot].flatten(0, 1), live[:, :, slot].flatten(0, 1).long()
    inside = torch.zeros_like(grad_NE, dtype=torch.bool).scatter(1, record_NK, True)
    picked_live = torch.zeros_like(inside).scatter(1, live_NK, True)
    scale = grad_NE.abs().max()
    # the last token predicts nothing, and what a softmax over all experts cancels leaves rounding
    fed = torch.ones(ids.shape, dtype=torch.bool)
    fed[:, -1] = False
    fed = fed.flatten()[:, None]
    assert (inside & ~picked_live & fed).sum() > 10
    assert (grad_NE[inside & ~picked_live & fed].abs() > 1e-9 * scale).all()
    assert (grad_NE[inside & fed].abs() > 1e-9 * scale).all()
    assert (grad_NE[~inside].abs() < 1e-14 * scale).all()
    if model_type in ("deepseek_v3", "gpt_oss"):
        assert (grad_NE[~inside] == 0).all()


def test_single_expert_with_renormalisation_teaches_the_router_nothing(ids):
    """g = 1 whatever the logit, as the formula says; without renormalisation it does learn."""
    for model_type, learns in (("mixtral", False), ("olmoe", True)):
        model = in_float64(model_type, num_experts_per_tok=1)
        replay = RouterReplay(model)
        grad_NE, _ = logit_gradients(model, replay, foreign_record(replay, *ids.shape), ids)
        assert (grad_NE.abs().max() > 1e-6) == learns


def test_router_learns_and_later_updates_execute_the_record(model, ids):
    """Several updates with one record: the router moves, live selections drift, executed ids do not."""
    replay = RouterReplay(model)
    record = record_of(model, replay, ids)
    gates = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("gate.weight")}
    assert len(gates) == len(replay.moe_layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    model.train()
    for _ in range(3):
        with executed_ids(model) as seen, replay.replay(record):
            loss = model(ids, labels=ids).loss
        assert torch.equal(as_sets(stacked(seen, 2)), as_sets(record))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert changed_rows(record_of(model, replay, ids), record).any()
    assert all(not torch.equal(p, gates[n]) for n, p in model.named_parameters() if n in gates)


def test_router_logits_and_auxiliary_loss_are_live(model, padded):
    ids, mask = padded
    untouched = copy.deepcopy(model)
    live = untouched(ids, attention_mask=mask, output_router_logits=True)
    replay = RouterReplay(model)
    blocks = blocks_of(model)
    watched = Watched(blocks)
    with replay.replay(foreign_record(replay, *ids.shape)):
        out = model(ids, attention_mask=mask, output_router_logits=True)
    unpatched = blocks_of(untouched)
    expected = tuple(F.linear(watched.inputs[layer], unpatched[layer].gate.weight) for layer in blocks)
    assert all(torch.equal(*pair) for pair in zip(out.router_logits, expected, strict=True))
    assert not torch.equal(out.router_logits[-1], live.router_logits[-1]), "the record changes the hidden states"
    aux = load_balancing_loss_func(expected, 8, 2, mask)
    assert torch.equal(out.aux_loss, aux)
    weights = tuple(logits.softmax(-1) for logits in expected)
    assert (load_balancing_loss_func(weights, 8, 2, mask) - aux).abs() > 1e-4, "softmax values are no logits"
    assert (load_balancing_loss_func(expected, 8, 2) - aux).abs() > 1e-4, "padding does not count"
    out.aux_loss.backward()
    assert all(block.gate.weight.grad.abs().max() > 0 for block in blocks.values())
