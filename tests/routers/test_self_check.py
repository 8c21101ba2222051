"""The check of a router runs the real one: what it refuses is named, and the forward around it ends."""

from __future__ import annotations

import pytest
import torch
from model_zoo import build_tiny
from oracles import foreign_record
from routers.left_behind import same_traces, traces
from routers.own_mixtures import K, live_groups, with_mixtures

from trl_r3 import RouterReplay, UnsupportedRouterError
from trl_r3.routers import discovery


def test_router_that_ignores_the_record_is_refused(qwen, ids):
    """The self-check runs the real router: one that selects again by itself must not pass."""
    gate = qwen.model.layers[3].mlp.gate
    own = type(gate).forward

    def selects_again(hidden):
        logits, weights, chosen = own(gate, hidden)
        return logits, weights, logits.argsort(-1, descending=True)[:, :2]

    before = traces(qwen)
    gate.forward = selects_again
    with pytest.raises(UnsupportedRouterError, match=r"layers\.3\.mlp\.gate \(Qwen3MoeTopKRouter, 2 of 8 experts\)"):
        RouterReplay(qwen)
    del gate.forward
    assert same_traces(traces(qwen), before)


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


def by_where(scores, size):
    return torch.topk(torch.where(live_groups(scores), scores, torch.zeros_like(scores)), K, dim=-1)


def by_product(scores, size):
    return torch.topk(scores * live_groups(scores), K, dim=-1)


def in_place(scores, size):
    return torch.topk(scores.clone().masked_fill_(~live_groups(scores), 0.0), K, dim=-1)


def by_index(scores, size):
    masked = scores.clone()
    masked[~live_groups(scores)] = -torch.inf
    values, ids = torch.topk(masked, K, dim=-1)
    return values.exp(), ids


@pytest.mark.parametrize("select", [by_where, by_product, in_place, by_index])
def test_weights_from_scores_that_were_masked_somehow_are_refused(select):
    """An expert of another group would get no weight, and its router no gradient."""
    with pytest.raises(UnsupportedRouterError, match=r"layers\.1\.mlp .* by something other than `masked_fill`"):
        RouterReplay(with_mixtures(select))


def by_masked_fill(scores, size):
    return torch.topk(scores.masked_fill(~live_groups(scores), 0.0), K, dim=-1)


def gathered_beside(scores, size):
    ids = torch.topk(scores * live_groups(scores), K, dim=-1)[1]
    return scores.gather(1, ids), ids


def some_are_never_chosen(scores, size):
    dead = torch.tensor([0.0, 1, 1, 1, 0, 1, 1, 1])
    return torch.topk(scores * dead, K, dim=-1)


@pytest.mark.parametrize("select", [by_masked_fill, gathered_beside, some_are_never_chosen])
def test_masks_that_only_select_are_none_of_it(select, ids):
    model = with_mixtures(select)
    replay = RouterReplay(model, gating="intercept")
    record = foreign_record(replay, *ids.shape) % 4 + torch.tensor([0, 4])  # one each of both halves
    if select is some_are_never_chosen:
        record = record.clamp(min=1).where(record != 4, 5)
    with replay.replay(record):
        model(ids, labels=ids).loss.backward()
    gradient = model.model.layers[1].mlp.weight.grad
    assert gradient.isfinite().all() and (gradient[record[:, :, 0].unique()].abs().amax(-1) > 0).all()


def test_an_expert_that_is_skipped_may_have_no_token_while_attaching(ids):
    """Zaya names expert 0 in place of its last choice, which is none; new weights never choose it."""
    model = build_tiny("zaya")
    routers = [layer.mlp.gate for layer in model.model.layers]
    for router in routers:
        router.balancing_biases[-1] = -2.0
    replay = RouterReplay(model)
    for router in routers:
        router.balancing_biases[-1] = 2.0
    with torch.no_grad(), replay.record() as recorded:
        live = model(ids).logits
    assert (recorded.routed_experts == replay.num_experts - 1).all()
    for router in routers:
        router.balancing_biases[-1] = -2.0
    with torch.no_grad(), replay.replay(recorded.routed_experts):
        assert torch.equal(model(ids).logits, live)


def test_scores_that_underflow_are_not_masked():
    """Large logits leave a few experts a probability; the others have exactly 0."""

    def saturated(scores, size):
        return torch.topk((scores.log() * 300).softmax(-1), K, dim=-1)

    RouterReplay(with_mixtures(saturated)).remove()
