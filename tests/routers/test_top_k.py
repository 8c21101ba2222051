"""The top-k of a router, bound anew or watched: both do the same, and a watched one sees scores before a mask."""

from __future__ import annotations

import pytest
import torch
from model_zoo import build_tiny
from oracles import foreign_record
from routers.blocks import batch, in_float64, logit_gradients

from trl_r3 import RouterReplay


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "olmoe"])
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_rebound_forwards_do_what_watched_ones_do(model_type, checkpointing):
    """The fast way to the one top-k call, and its slow twin."""
    found = []
    for rebound in (True, False):
        model = build_tiny(model_type).train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        with RouterReplay(model, gating="intercept") as replay:
            assert all(router.rebound is not None for router in replay.routers)
            if not rebound:
                for router in replay.routers:
                    router.rebound = None
            with torch.no_grad(), replay.record() as recorded:
                live = model(batch(), use_cache=False).logits
            with replay.replay((recorded.routed_experts + 1) % replay.num_experts) as stats:
                logits = model(batch(), use_cache=False).logits
            assert not torch.equal(logits, live) and int(stats.changed_routers) > 0
            logits.float().log_softmax(-1)[..., 0].sum().backward()
        found.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_masked_scores_are_watched():
    """Group-limited gates mask their scores first, which a name bound to another function would not show."""
    with RouterReplay(
        build_tiny("deepseek_v2", topk_method="group_limited_greedy", n_group=2, topk_group=1)
    ) as replay:
        assert all(router.rebound is None for router in replay.routers)


def test_group_limited_gate_gives_true_weight_outside_the_live_groups(ids):
    """DeepSeek-V2 takes its weights from scores that are 0 outside the live groups."""
    model = in_float64("deepseek_v2")
    gate = model.model.layers[1].mlp.gate
    assert gate.topk_method == "group_limited_greedy"
    replay = RouterReplay(model)
    record = foreign_record(replay, *ids.shape)
    weights = []
    handle = gate.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    grad_NE, logits_NE = logit_gradients(model, replay, record, ids)
    handle.remove()
    record_NK = record[:, :, 0].flatten(0, 1)
    groups, size = gate.num_group, 8 // gate.num_group
    best = logits_NE.unflatten(1, (groups, size)).amax(-1).topk(gate.topk_group).indices
    outside = ~(record_NK[:, :, None] // size == best[:, None, :]).any(-1)
    assert outside.sum() > 5
    expected = logits_NE.softmax(-1).gather(1, record_NK) * gate.routed_scaling_factor
    assert (weights[0] - expected).abs().max() < 1e-12
    fed = torch.ones(ids.shape, dtype=torch.bool)
    fed[:, -1] = False
    assert (grad_NE.gather(1, record_NK)[outside & fed.flatten()[:, None]].abs() > 1e-9 * grad_NE.abs().max()).all()
