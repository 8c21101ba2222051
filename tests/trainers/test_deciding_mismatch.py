"""A run is told once when the k3 of live routing is so high that it decides, and never by a single batch."""

import math
import warnings

import pytest
import torch
from trl import GRPOTrainer

from trl_r3 import R3GRPOConfig, R3GRPOTrainer
from trl_r3.trainers.deciding_mismatch import DECIDING_K3, DecidingMismatch

ABOVE, BELOW = 1.5 * DECIDING_K3, 0.5 * DECIDING_K3
LIVE, OWN = "sampling/live/k3_kl", "sampling/k3_kl"


def warned(look, values):
    """The message after each value, or `None`."""
    told = []
    for value in values:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            look(value)
        told.append(str(caught[0].message) if caught else None)
    return told


def test_once_and_by_the_mean():
    watch = DecidingMismatch()
    told = warned(lambda k3: watch.look_at_log({LIVE: k3}, replays=True), [10 * ABOVE, BELOW, None, math.nan, ABOVE])
    assert told[:-1] == [None] * 4  # one batch of three was far above, but there were but two
    assert "docs/when_it_helps.md" in told[-1] and "Keep `use_routing_replay=True`" in told[-1]
    assert warned(lambda k3: watch.look_at_log({LIVE: k3}, replays=True), [ABOVE] * 5) == [None] * 5


def test_a_run_below_is_left_alone():
    watch = DecidingMismatch()
    assert warned(lambda k3: watch.look_at_log({LIVE: k3}, replays=True), [BELOW] * 20 + [2 * ABOVE]) == [None] * 21


@pytest.mark.parametrize(("replays", "name"), [(True, LIVE), (False, OWN)])
def test_only_what_live_routing_does_counts(replays, name):
    other = {LIVE: OWN, OWN: LIVE}[name]
    watch = DecidingMismatch()
    assert not any(warned(lambda k3: watch.look_at_log({other: k3}, replays), [ABOVE] * 5))
    told = warned(lambda k3: watch.look_at_log({name: k3}, replays), [ABOVE] * 3)
    assert ("Set `use_routing_replay=True`" in told[-1]) is not replays


def test_a_batch_without_records():
    sampled, mask = torch.full((2, 3), -1.0), torch.ones(2, 3)
    far = {"old_per_token_logps": sampled - 1, "sampling_per_token_logps": sampled, "completion_mask": mask}
    near = {**far, "old_per_token_logps": sampled - 0.01}
    assert math.exp(-1) > ABOVE  # k3 of a log ratio of -1 is e^-1
    assert not any(warned(DecidingMismatch().look_at_batch, [near] * 5))
    assert not any(warned(DecidingMismatch().look_at_batch, [{"completion_mask": mask}] * 5))
    assert "Set `use_routing_replay=True`" in warned(DecidingMismatch().look_at_batch, [far] * 3)[-1]


def test_in_a_run(qwen3, train, gap):
    run = {"while_generating": gap["scrambled"], "routing_replay_compare_every": 1, "max_steps": 4}
    with pytest.warns(RuntimeWarning, match="with live routing k3 between rollout and training is .*when_it_helps"):
        trainer = train(qwen3(initializer_range=0.5), **run)
    assert trainer.state.log_history[0][LIVE] > DECIDING_K3


class Sampled(GRPOTrainer):
    """TRL's, whose batches have what they have with vLLM."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        batch["sampling_per_token_logps"] = torch.zeros_like(batch["completion_ids"], dtype=torch.float32)
        return {"old_per_token_logps": batch["sampling_per_token_logps"] - 1, **batch}


def test_in_a_run_without_replay(qwen3, build):
    class Plain(R3GRPOTrainer, Sampled):
        pass

    trainer = build(qwen3(), trainer_class=Plain, use_routing_replay=False, max_steps=3)
    with pytest.warns(RuntimeWarning, match="with live routing k3 .*Set `use_routing_replay=True`"):
        trainer.train()


@pytest.mark.parametrize("masks", [False, True])
def test_a_dense_model_is_not_told_to_replay(make_masked, masks):
    class Far(R3GRPOTrainer, Sampled):
        def log(self, logs, *args):
            super().log({**logs, OWN: ABOVE}, *args)  # as with masks it may be

    kind = (R3GRPOConfig, Far, GRPOTrainer)
    trainer = make_masked(kind=kind, use_sampling_mask_replay=masks, top_p=0.9 if masks else 1.0, max_steps=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert not [each for each in caught if "live routing" in str(each.message)]
