"""Rollouts that are scored once more with live routing: when, what is logged of it, and that nothing else changes."""

import pytest
import torch
from trainers.forcing import logged

LIVE = ["sampling/live/k3_kl", "sampling/live/extreme_token_frac"]


@pytest.mark.parametrize(
    ("every", "updates", "steps"),
    [
        (0, {"max_steps": 3}, []),
        (1, {"max_steps": 3}, [1, 2, 3]),
        (2, {"max_steps": 5}, [1, 3, 5]),
        (3, {"max_steps": 8, "num_iterations": 2}, [1, 5]),  # a rollout every two steps
    ],
)
def test_live_routing_is_compared_every_so_many_steps(qwen3, train, check, gap, every, updates, steps):
    run = {"routing_replay_compare_every": every, "while_generating": gap["scrambled"], **updates}
    trainer = train(qwen3(), **run)
    for name in LIVE:
        assert sorted(logged(trainer, name)) == steps
    compared = [one for one in trainer.passes if one.name == "comparison"]
    assert [one.step + 1 for one in compared] == steps
    for one in compared:
        check.live(trainer, one)
        check.drifted(trainer, one)
    for one in trainer.of("update"):
        check.replayed(one)


def test_comparison_starts_again_with_training(qwen3, build):
    trainer = build(qwen3(), routing_replay_compare_every=3, max_steps=3)
    for _ in range(2):
        trainer.train()
        assert sorted(logged(trainer, "sampling/live/k3_kl")) == [1]


def test_comparison_changes_nothing(qwen3, train):
    run = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 4}
    trainer = train(qwen3(), routing_replay_compare_every=1, **run)
    plain = train(qwen3(), **run)
    assert trainer.losses == plain.losses
    weights = plain.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("mode", ["R3", "R2"])
def test_replay_closes_most_of_the_gap(qwen3, train, gap, mode):
    trainer = train(
        qwen3(num_hidden_layers=6, num_experts=32),
        routing_replay_mode=mode,
        num_iterations=2,
        max_steps=2,
        per_device_train_batch_size=16,
        max_completion_length=24,
        generation_kwargs={"suppress_tokens": [0, 1]},
        routing_replay_compare_every=1,
        while_generating=gap["rounded"],
    )
    replayed, live = (logged(trainer, name)[1] for name in ("sampling/k3_kl", "sampling/live/k3_kl"))
    assert live > 1e-5
    if mode == "R3":
        assert replayed < 0.5 * live
    else:
        assert replayed == pytest.approx(live)  # the old policy of R2 routes live
