"""Selective activation checkpointing: a recompute finds what its policy saved of the forward, whatever that is."""

from functools import partial

import pytest
import torch
from engines.tiny_chat import tiny_qwen3_moe
from oracles import as_sets, foreign_record, stacked
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from trl_r3 import RouterReplay
from trl_r3.cli.experts import executed_ids

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default}
SELECTION = {aten.topk.default, aten.select.int, aten.gather.default, aten._to_copy.default, aten.where.self}
# experts add to a buffer in place, which a policy cannot save, with or without replay
POLICIES = {
    "most": lambda context, op, *args, **kwargs: _save("zeros" not in str(op) and "_." not in str(op)),
    "products": lambda context, op, *args, **kwargs: _save(op in PRODUCTS),
    "selection": lambda context, op, *args, **kwargs: _save(op in SELECTION),
    "attention": lambda context, op, *args, **kwargs: _save("attention" in str(op)),
}


def _save(yes):
    return CheckpointPolicy.MUST_SAVE if yes else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(model, policy):
    contexts = partial(create_selective_checkpoint_contexts, POLICIES[policy])
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


def trained(gating, policy, *, missing=False, observed=False):
    """Executed ids of the forward and of the recompute if there is one, the record, live ids, and gradients."""
    model = tiny_qwen3_moe().train()
    ids = (torch.arange(48).reshape(4, 12) * 7 + 3) % 100 + 10
    if policy is not None:
        checkpointed(model, policy)
    with RouterReplay(model, gating) as replay:
        record = foreign_record(replay, *ids.shape)
        with replay.record() as recorded, torch.no_grad():
            model(ids)
        if missing:
            record[1, 3:7] = -1
        with executed_ids(model) as seen, replay.replay(record) as stats:
            loss = model(ids, labels=ids).loss
            loss.backward()
        executed = [stacked({layer: [calls[i]] for layer, calls in seen.items()}, 4) for i in range(len(seen[0]))]
        changed = float(stats.changed_routers)
    return executed, record, recorded.routed_experts, changed, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("gating", ["intercept", "op"])
def test_replay_goes_through_any_policy(gating, policy, missing):
    executed, record, live, changed, gradients = trained(gating, policy, missing=missing)
    expected = torch.where(record < 0, live, record)
    assert (as_sets(live) != as_sets(expected)).any(-1).float().mean() > 0.5
    assert len(executed) == 2  # the recompute calls the experts, too
    assert (as_sets(executed[0])[record[..., 0] >= 0] == as_sets(record)[record[..., 0] >= 0]).all()
    assert all((as_sets(each) == as_sets(executed[0])).all() for each in executed)
    _, _, _, plainly_changed, plain = trained(gating, None, missing=missing)
    assert changed == plainly_changed > 0
    assert all(torch.equal(one, other) for one, other in zip(gradients, plain, strict=True))
