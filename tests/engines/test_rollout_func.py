"""Rollout functions bring their own routes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from engines.fake_vllm import fake_vllm, routes_of
from engines.tiny_chat import VOCAB, WatchedGRPO, make_trainer
from engines.watch import assert_nothing_missing, assert_replayed, rows_of_turns, wrong_rows

from trl_r3 import stitch

PROMPTS = ["t30 t31 t32", "t40", "t50 t51 t52 t53", "t60 t61"]
EXAMPLES = Path(__file__).parents[2] / "examples"


def make(tmp_path, rollout_func=None, **settings):
    extra = {"rollout_func": rollout_func} if rollout_func is not None else {}
    defaults = {"per_device_train_batch_size": 8}
    return make_trainer(tmp_path, Dataset.from_dict({"prompt": PROMPTS}), **{**defaults, **settings}, **extra)


def one_turn(prompts, trainer):
    prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    turn, logprobs = trainer.rollout_turn(prompt_ids)
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": turn.completion_ids,
        "logprobs": logprobs,
        "routed_experts": turn.records,
    }


def two_turns(prompts, trainer):
    """The environment says three words after the first turn."""
    prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    first, first_logprobs = trainer.rollout_turn(prompt_ids)
    said = [VOCAB["sun"], VOCAB["moon"], VOCAB["wait"]]
    fed = [p + list(c) + said for p, c in zip(prompt_ids, first.completion_ids, strict=True)]
    second, second_logprobs = trainer.rollout_turn(fed)
    completion_ids = [
        list(a) + said + list(b) for a, b in zip(first.completion_ids, second.completion_ids, strict=True)
    ]
    rollout = stitch([first, second], prompt_ids, completion_ids, trainer.routing_replay.layout)
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "logprobs": first_logprobs
        and [a + [0.0] * 3 + b for a, b in zip(first_logprobs, second_logprobs, strict=True)],
        "env_mask": [
            [1] * len(a) + [0] * 3 + [1] * len(b)
            for a, b in zip(first.completion_ids, second.completion_ids, strict=True)
        ],
        "routed_experts": rollout.records,
    }


def foreign(prompts, trainer):
    """Routes that the model would not select, one slot per decoder layer as engines send them."""
    output, generator = one_turn(prompts, trainer), np.random.default_rng(0)
    for sample, record in enumerate(output["routed_experts"]):
        choices = generator.random((len(record), 4, 16)).argsort(-1)[..., :4]
        output["routed_experts"][sample] = choices.astype(np.int32)
    trainer.sent = list(zip(output["prompt_ids"], output["completion_ids"], output["routed_experts"], strict=True))
    return output


def test_one_turn(tmp_path):
    trainer = make(tmp_path, one_turn)
    trainer.train()
    assert_replayed(trainer, rows_of_turns(trainer))
    assert_nothing_missing(trainer, steps=2)


def test_two_turns_are_stitched(tmp_path):
    trainer = make(tmp_path, two_turns)
    trainer.train()
    expected = {}
    for first, second in zip(trainer.turns[::2], trainer.turns[1::2], strict=True):
        expected[first.step] = [
            ([*p, *c], torch.cat([first.rows(i), second.rows(i)[len(first.rows(i)) :]]))
            for i, (p, c) in enumerate(zip(second.prompt_ids, second.completion_ids, strict=True))
        ]
    assert_replayed(trainer, expected)
    assert_nothing_missing(trainer, steps=2)


def test_evaluation_records_nothing(tmp_path):
    seen = []

    def note(prompts, trainer):
        output = two_turns(prompts, trainer)
        seen.append((trainer.model.training, output["logprobs"] is None))
        return output

    def reward(completions, **kwargs):
        assert "routed_experts" not in kwargs
        return [float(i) for i in range(len(completions))]

    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": Dataset.from_dict({"prompt": PROMPTS})}
    trainer = make(tmp_path, note, per_device_eval_batch_size=8, reward_funcs=reward, **evaluation)
    trainer.train()
    assert seen == [(True, False), (False, True)] * 2
    assert_nothing_missing(trainer, steps=2)


def test_what_the_function_returns_is_what_is_replayed(tmp_path):
    trainer = make(tmp_path, foreign, max_steps=1)
    trainer.train()
    moe = [0, 2, 3]
    expected = [([*p, *c], torch.from_numpy(ids[:, moe]).long()) for p, c, ids in trainer.sent]
    assert_replayed(trainer, {0: expected})
    [log] = [log for log in trainer.state.log_history if "routing_replay/changed_router_frac" in log]
    assert log["routing_replay/changed_router_frac"] > 0.9


def test_logprobs_of_a_turn_are_those_of_the_model(tmp_path):
    seen = {}

    def note(prompts, trainer):
        output = one_turn(prompts, trainer)
        seen.setdefault("rollout", [torch.tensor(values) for values in output["logprobs"]])
        return output

    trainer = make(tmp_path, note, max_steps=1, shuffle_dataset=False)
    trainer.train()
    sampled = {
        (*p, *c): values
        for p, c, values in zip(
            trainer.turns[0].prompt_ids, trainer.turns[0].completion_ids, seen["rollout"], strict=True
        )
    }
    update = trainer.updates[0]
    for (tokens, _), scored in zip(update.samples(), update.logprobs, strict=True):
        assert torch.allclose(scored[: len(sampled[tokens])], sampled[tokens], atol=1e-5)


def spoiled(how):
    def rollout_func(prompts, trainer):
        output = one_turn(prompts, trainer)
        how(output)
        return output

    return rollout_func


def without_routes(output):
    del output["routed_experts"]


def one_sample_short(output):
    output["routed_experts"] = output["routed_experts"][:-1]


def two_rows_short(output):
    output["routed_experts"][5] = output["routed_experts"][5][:-2]


def rows_of_another_sample(output):
    routes = output["routed_experts"]
    lengths = [len(record) for record in routes]
    other = next(i for i, length in enumerate(lengths) if length != lengths[3])
    routes[3] = routes[other]


def too_many_experts(output):
    output["routed_experts"][2] = output["routed_experts"][2].long() + 13


def layers_of_another_model(output):
    output["routed_experts"][6] = output["routed_experts"][6][:, :2]


def fewer_experts_a_token(output):
    output["routed_experts"][1] = output["routed_experts"][1][..., :2]


def weights_instead_of_ids(output):
    output["routed_experts"][0] = torch.rand(output["routed_experts"][0].shape)


def all_zero(output):
    output["routed_experts"][4] = torch.zeros_like(output["routed_experts"][4])


def flat(output):
    output["routed_experts"][7] = output["routed_experts"][7].flatten(1)


@pytest.mark.parametrize(
    "how, message",
    [
        (without_routes, "`rollout_func` returned no `routed_experts`"),
        (one_sample_short, "`routed_experts` of 7 samples for 8 prompts"),
        (two_rows_short, r"sample 5: the record has \d+ rows for \d+ tokens"),
        (rows_of_another_sample, r"sample 3: the record has \d+ rows for \d+ tokens"),
        (too_many_experts, r"sample 2.*: expert id \d+ is outside \[0, 16\)"),
        (
            layers_of_another_model,
            "sample 6: .* has 2 layer slots, but the model has 3 MoE layers and 4 decoder layers",
        ),
        (fewer_experts_a_token, "sample 1: .* the last dimension must be 4"),
        (weights_instead_of_ids, "sample 0: .* dtype torch.float32, but expert ids are integers"),
        (all_zero, "sample 4, decoder layer 0 .*: expert 0 appears 4 times"),
        (flat, "sample 7: `routed_experts` has 2 dimensions"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_routes_are_an_error_that_names_the_sample(tmp_path, how, message):
    trainer = make(tmp_path, spoiled(how), generation_kwargs={"min_new_tokens": 4}, max_completion_length=9)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_missing_rows_are_counted(tmp_path):
    def forget(output):
        for record in output["routed_experts"]:
            record[-2:] = 255

    with pytest.raises(RuntimeError, match="rows have no record, the first in sample 0"):
        make(tmp_path, spoiled(forget), generation_kwargs={"min_new_tokens": 4}).train()
    trainer = make(tmp_path, spoiled(forget), generation_kwargs={"min_new_tokens": 4}, routing_replay_max_missing=0.5)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "routing_replay/missing_frac" in log]
    for one, log in zip(trainer.updates, logs, strict=True):
        rows = sum(len(rows) for _, rows in one.samples())
        assert log["routing_replay/missing_frac"] == pytest.approx(2 * 8 / rows)


def test_the_example(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import rollout_func_multi_turn as example

    monkeypatch.setattr(example, "R3GRPOTrainer", WatchedGRPO)
    trainer = example.main(["--output-dir", str(tmp_path), "--steps", "2"])
    turns = [turn for turn in trainer.turns if turn.step == 0]
    assert len(turns) > 2 and len(turns[-1].prompt_ids) <= len(turns[0].prompt_ids)
    assert_nothing_missing(trainer, steps=2)
    for one in trainer.updates:
        for tokens, rows in one.samples():
            assert wrong_rows(rows, trainer.live_rows(tokens, one.weights)) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"use_routing_replay": False},
        {"routing_replay_mode": "R2", "num_iterations": 2},
        {"use_sampling_mask_replay": True, "top_k": 5},
        {"use_routing_replay": False, "use_sampling_mask_replay": True, "top_k": 5},
    ],
)
def test_the_example_with_other_switches(tmp_path, monkeypatch, changes):
    """One function serves the run with replay and those that it is compared with."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import rollout_func_multi_turn as example

    config = example.R3GRPOConfig
    monkeypatch.setattr(example, "R3GRPOConfig", lambda *args, **own: config(*args, **{**own, **changes}))
    trainer = example.main(["--output-dir", str(tmp_path), "--steps", "2"])
    assert trainer.state.global_step == 2


def test_turns_that_are_asked_for_at_once(server_trainer):
    """Agents in threads, each with a conversation of its own."""
    played = []

    def play(trainer, prompt):
        tokens, turns = list(prompt), []
        for _ in range(3):
            turn, logprobs = trainer.rollout_turn([list(tokens)])
            assert [len(values) for values in logprobs] == [len(ids) for ids in turn.completion_ids]
            turns.append(turn)
            tokens += turn.completion_ids[0]
        return turns, tokens

    def at_once(prompts, trainer):
        prompt_ids = [[*trainer.processing_class(prompt)["input_ids"], 20 + i] for i, prompt in enumerate(prompts)]
        with ThreadPoolExecutor(len(prompts)) as threads:
            conversations = list(threads.map(partial(play, trainer), prompt_ids))
        played.extend(conversations)
        completion_ids = [tokens[len(p) :] for p, (_, tokens) in zip(prompt_ids, conversations, strict=True)]
        turns = [turn for turns, _ in conversations for turn in turns]
        rollout = stitch(turns, prompt_ids, completion_ids, trainer.routing_replay.layout)
        logprobs = [[-1.0] * len(ids) for ids in completion_ids]
        records = {"routed_experts": rollout.records, "logprobs": logprobs}
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, **records}

    with fake_vllm(longest_delay=0.02) as fake:
        trainer = server_trainer(fake, rollout_func=at_once, max_steps=1, routing_replay_alarm="off")
        trainer.train()
    for turns, _ in played:
        for turn in turns:
            expected = routes_of([*turn.prompt_ids[0], *turn.completion_ids[0]])[:, [0, 2, 3]]
            assert np.array_equal(turn.records[0].numpy(), expected)
    assert len(played) == 8
