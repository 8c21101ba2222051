"""A record that belongs to other tokens stops the first step, before the optimizer moves; a right one never does."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from trl_r3 import MisalignedRecordError

# of one length, so that records fit one another
PROMPTS = ["1+2=3abcdefgh", "abcdefg hijkl", "xyz(a,b)(c,d)", "hello you the"]
LONG = {
    "max_completion_length": 48,
    "per_device_train_batch_size": 8,
    "num_generations": 2,
    "max_steps": 2,
    "generation_kwargs": {"suppress_tokens": [0, 1]},
}


def of_another_layer(records):
    return [record.roll(1, 1) for record in records]


def constant(records):
    return [records[0][:1].expand_as(record).clone() for record in records]


def one_layer_constant(records):
    changed = [record.clone() for record in records]
    for record in changed:
        record[:, -1] = records[0][0, -1]
    return changed


WRONG = {
    "one early": (lambda records: [record.roll(-1, 0) for record in records], "moved by one token"),
    "one late": (lambda records: [record.roll(1, 0) for record in records], "moved by one token"),
    "another layer": (of_another_layer, r"layer 0 .* fits the rows of layer 2"),
    "other samples": (lambda records: [*records[1:], records[0]], r"layer 0 .* other tokens, or another sample"),
    "constant": (constant, r"layer 0 .* one constant row"),
    "constant in the last layer": (one_layer_constant, r"layer 3 \(the lowest of 1 of 3\) .* one constant row"),
}


def rollout(change=lambda records: records, noise=0.0):
    """A `rollout_func` that records with the trainer's engine, and hands out what `change` makes of it."""

    def play(prompts, trainer):
        prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        turn, logprobs = trainer.rollout_turn(prompt_ids)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": turn.completion_ids,
            "logprobs": [[value + noise * (-1) ** i for i, value in enumerate(row)] for row in logprobs],
            "routed_experts": change(list(turn.records)),
        }

    return play


@pytest.fixture
def long_run(qwen3, build):
    def make(change=lambda records: records, **settings):
        return build(
            qwen3(initializer_range=0.2), prompts=PROMPTS, rollout_func=rollout(change), **{**LONG, **settings}
        )

    return make


# With the old policy scored the pass over it judges, else the first update
@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}], ids=["first update", "old policy"])
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_records_stop_the_first_step(long_run, kind, changes):
    change, words = WRONG[kind]
    trainer = long_run(change, **changes)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(MisalignedRecordError, match=words):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("gating", ["intercept", "op"])
def test_right_records_train_and_are_logged(long_run, changes, gating):
    trainer = long_run(routing_replay_gating=gating, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "routing_replay/agreement" in entry]
    assert len(entries) >= 1
    assert all(entry["routing_replay/agreement"] > 0.99 for entry in entries)
    assert all(entry["routing_replay/contrast"] > 0.15 for entry in entries)


@pytest.mark.parametrize("action", ["warn", "off"])
def test_alarm_can_be_a_warning_or_off(long_run, action):
    trainer = long_run(WRONG["other samples"][0], routing_replay_alarm=action, max_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(each.message) for each in caught if "is not that of its tokens" in str(each.message)]
    assert bool(told) == (action == "warn")
    assert trainer.state.global_step == 1
    assert trainer.state.log_history[0]["routing_replay/agreement"] < 0.5


def test_few_rows_wait_for_those_of_later_rollouts(long_run):
    trainer = long_run(WRONG["other samples"][0], max_completion_length=8, per_device_train_batch_size=4, max_steps=20)
    with pytest.raises(MisalignedRecordError, match=r"over \d+ rows"):
        trainer.train()
    assert 1 <= trainer.state.global_step < 10


def test_own_records_are_logged_and_never_judged(qwen3, build, gap):
    """The rollout of another model would be wrong as a record; here its weights are the reason."""
    trainer = build(qwen3(initializer_range=0.2), prompts=PROMPTS, while_generating=gap["scrambled"], **LONG)
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.state.log_history[0]["routing_replay/agreement"] < 0.5


def test_collapsed_routers_are_no_fault_but_said(qwen3, build):
    policy = qwen3()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith("gate.weight"):
                parameter.zero_()
    trainer = build(policy, prompts=PROMPTS, rollout_func=rollout(), **{**LONG, "max_steps": 1})
    with pytest.warns(RuntimeWarning, match="routed to the same experts"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_replay_that_is_worse_than_live_is_said(qwen3, build):
    trainer = build(
        qwen3(initializer_range=0.2),
        prompts=PROMPTS,
        rollout_func=rollout(
            lambda records: [(record.long() + 1).remainder(16).to(record) for record in records], 1e-3
        ),
        routing_replay_alarm="off",
        routing_replay_compare_every=1,
        **{**LONG, "num_iterations": 2, "max_steps": 1},
    )
    with pytest.warns(RuntimeWarning, match="replay makes the mismatch worse") as told:
        trainer.train()
    (place,) = {each.filename for each in told if "mismatch worse" in str(each.message)}
    assert Path(place).parent == Path(__file__).parent  # a subclass is the user's, too
