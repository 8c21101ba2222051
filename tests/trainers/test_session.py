"""Which pass goes through which experts, and what that does to ratios, gradients and routers."""

from contextlib import nullcontext

import pytest
import torch
from trainers.runs import CHECKPOINTING
from trainers.watching import same_sets

from trl_r3 import R3GRPOTrainer

OFF_POLICY = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 8, "learning_rate": 1e-2}  # two rollouts


@pytest.fixture(params=["qwen3", "mixtral"])
def model(request):
    return request.getfixturevalue(request.param)()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_every_pass_executes_the_record(model, train, check, checkpointing):
    trainer = train(model, **OFF_POLICY, **CHECKPOINTING[checkpointing])
    old_policy, updates, recomputes = (trainer.of(name) for name in ("old policy", "update", "recompute"))
    assert (len(old_policy), len(updates)) == (2, 8)
    for one in old_policy + updates:
        check.replayed(one)
    for one in recomputes:
        if checkpointing == "none":
            assert not one.calls
        else:
            check.replayed(one)
    for first in (0, 4):
        for moved in updates[first + 1 : first + 4]:
            check.drifted(trainer, moved)  # the weights have moved far enough to choose others


def test_every_recorded_row_is_replayed(qwen3, train, check):
    trainer = train(qwen3(), **OFF_POLICY)
    for one in trainer.of("update"):
        check.replayed(one)
        assert torch.equal(one.fed.sum(1), one.attention_mask.sum(1) - 1)
    lengths = {tuple(one.attention_mask.sum(1).tolist()) for one in trainer.of("update")}
    assert len(set().union(*lengths)) > 2  # or padding would go untested


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
def test_checkpointing_leaves_the_weights_that_none_leaves(qwen3, train, gap, checkpointing):
    # without auxiliary loss: Transformers collects router logits by hooks, where the reentrant kind has no gradient
    run = {"max_steps": 3, "num_iterations": 3, "while_generating": gap["scrambled"], "router_aux_loss_coef": 0.0}
    plain = train(qwen3(), **run, **CHECKPOINTING["none"]).model.state_dict()
    trained = train(qwen3(), **run, **CHECKPOINTING[checkpointing])
    for name, weight in trained.model.state_dict().items():
        assert torch.allclose(weight, plain[name], atol=1e-5, rtol=1e-4), name


def test_record_lost_before_backward_is_refused(qwen3, train, monkeypatch):
    monkeypatch.setattr("trl_r3.routers.router_replay.bound_checkpoints", lambda *args: nullcontext())
    with pytest.raises(RuntimeError, match="recomputed in backward"):
        train(qwen3(), **CHECKPOINTING["reentrant"])


def test_record_lost_before_backward_is_seen_by_these_tests(qwen3, train, gap, check, monkeypatch):
    monkeypatch.setattr("trl_r3.routers.router_replay.bound_checkpoints", lambda *args: nullcontext())
    monkeypatch.setattr("trl_r3.routers.router_replay.in_backward", lambda: False)
    run = {"max_steps": 3, "num_iterations": 3, "while_generating": gap["scrambled"], "router_aux_loss_coef": 0.0}
    plain = train(qwen3(), **run, **CHECKPOINTING["none"]).model.state_dict()
    wrong = train(qwen3(), **run, **CHECKPOINTING["reentrant"])
    for one in wrong.of("recompute"):
        with pytest.raises(AssertionError):
            check.replayed(one)
    weights = wrong.model.state_dict()
    assert not all(torch.allclose(weights[name], plain[name], atol=1e-5, rtol=1e-4) for name in plain)


def rows_by_tokens(one):
    """{tokens of a padded sample: its executed rows}."""
    return {tuple(tokens): rows for tokens, rows in zip(one.input_ids.tolist(), one.executed, strict=True)}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_r2_replays_the_old_policy(model, train, check, gap, checkpointing):
    run = {**OFF_POLICY, "max_steps": 4, "while_generating": gap["scrambled"], **CHECKPOINTING[checkpointing]}
    trainer = train(model, routing_replay_mode="R2", **run)
    (old_policy,) = trainer.of("old policy")
    check.live(trainer, old_policy)
    recorded = rows_by_tokens(old_policy)
    replaying = trainer.of("update") + [one for one in trainer.of("recompute") if one.calls]
    assert len(replaying) == (4 if checkpointing == "none" else 8)
    for one in replaying:
        expected = torch.stack([recorded[tuple(tokens)] for tokens in one.input_ids.tolist()])
        assert same_sets(one.executed[one.fed], expected[one.fed])
        check.drifted(trainer, one)
        assert not same_sets(one.executed[one.fed], one.recorded[one.fed])  # which is what R3 replays


def test_r3_replays_the_rollout_and_not_the_old_policy(model, train, check, gap):
    trainer = train(model, **OFF_POLICY, while_generating=gap["scrambled"])
    for one in trainer.of("old policy") + trainer.of("update"):
        check.drifted(trainer, one)
        check.replayed(one)


def in_double(model):
    model.set_experts_implementation("eager")  # PyTorch has no grouped matrix product for float64
    return model.double()


@pytest.mark.parametrize("rollout", ["rounded", "scrambled"])
def test_ratio_is_one_at_unchanged_weights(qwen3, train, check, gap, rollout):
    trainer = train(in_double(qwen3()), num_iterations=2, max_steps=2, while_generating=gap[rollout])
    (old_policy,), update = trainer.of("old policy"), trainer.of("update")[0]
    check.drifted(trainer, update)
    assert ratios(old_policy, update).eq(1.0).all()


@pytest.mark.parametrize("live", ["old policy", "update"])
def test_ratio_is_not_one_when_only_one_pass_replays(qwen3, train, gap, live):
    class OnePassOnly(R3GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            if self._inside == {"old policy": "scoring", "update": "update"}[live]:
                with self.live_routing():
                    return super()._get_per_token_logps_and_entropies(*args, **kwargs)
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    run = {"num_iterations": 2, "max_steps": 1, "while_generating": gap["rounded"]}
    trainer = train(in_double(qwen3()), trainer_class=OnePassOnly, **run)
    (old_policy,), (update,) = trainer.of("old policy"), trainer.of("update")
    assert (ratios(old_policy, update) - 1).abs().max() > 1e-6


def ratios(old_policy, update):
    """(tokens,): of the policy's updates to the old policy, on the completions, sample by sample."""
    old = {tuple(t): logps for t, logps in zip(old_policy.input_ids.tolist(), old_policy.logps, strict=True)}
    matched = torch.stack([old[tuple(tokens)] for tokens in update.input_ids.tolist()])
    completion = update.attention_mask[:, update.prompt_width :].bool()
    return (update.logps - matched)[completion].exp()


@pytest.mark.parametrize("mode", ["R3", "R2"])
def test_router_learns(qwen3, train, mode):
    model = qwen3()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    train(model, num_iterations=2, routing_replay_mode=mode, router_aux_loss_coef=0.0, max_steps=2)
    routers = [name for name in before if name.endswith("gate.weight")]
    assert len(routers) == 3
    for name in routers:
        assert (model.state_dict()[name] - before[name]).abs().max() > 1e-4
