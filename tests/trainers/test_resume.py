"""A run that stops and goes on, and one on two processes."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from trainers.two_processes import MODES, launched

RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}


def checkpoint(trainer, step):
    return str(Path(trainer.args.output_dir) / f"checkpoint-{step}")


@pytest.mark.parametrize("mode", ["R3", "R2"])
@pytest.mark.parametrize("adapters", [False, True])
def test_resumed_run_ends_like_one_that_never_stopped(qwen3, build, check, gap, mode, adapters):
    run = {
        **RUN,
        "num_iterations": 2,
        "routing_replay_mode": mode,
        "while_generating": gap["rounded"],
        "peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if adapters else None,
    }
    straight = build(qwen3(), **run)
    straight.train()
    # a checkpoint names experts one by one, which `Trainer` does not load into the fused ones of a model that runs
    start = qwen3() if adapters else type(straight.model).from_pretrained(checkpoint(straight, 2))
    resumed = build(start, **run)
    resumed.train(resume_from_checkpoint=checkpoint(straight, 2))
    assert resumed.state.global_step == 4
    assert [one.step for one in resumed.of("update")] == [2, 3]
    assert resumed.losses == straight.losses[2:]
    weights = straight.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())
    if mode == "R3":
        for one in resumed.of("old policy") + resumed.of("update") + resumed.of("recompute"):
            check.replayed(one)
        check.drifted(resumed, resumed.of("update")[-1])


def test_resumed_in_the_middle_of_a_rollout(qwen3, build, check):
    """The buffered rollout is not in the checkpoint: TRL rolls out again, and that record is the one to replay."""
    straight = build(qwen3(), num_iterations=4, **{**RUN, "save_steps": 1})
    straight.train()
    start = type(straight.model).from_pretrained(checkpoint(straight, 1))
    resumed = build(start, num_iterations=4, **{**RUN, "max_steps": 5})
    resumed.train(resume_from_checkpoint=checkpoint(straight, 1))
    assert resumed.of("rollout")[0].step == 1
    for one in resumed.of("update"):
        check.replayed(one)
    check.drifted(resumed, resumed.of("update")[1])


def test_checkpoint_is_that_of_a_plain_model(qwen3, train):
    """What is saved while replay is attached holds no trace of it."""
    trainer = train(qwen3(), **RUN)
    folder = Path(checkpoint(trainer, 4))
    loaded = type(trainer.model).from_pretrained(folder)
    weights = loaded.state_dict()
    assert set(weights) == set(qwen3().state_dict())
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())
    assert "routing" not in (folder / "config.json").read_text()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return launched(tmp_path_factory)


@pytest.fixture(params=MODES)
def two_processes(request, results):
    """The mode, and what each rank noted."""
    return request.param, results(request.param)


def rows_of(one, batch_size):
    """(B, T, L, K) of a pass."""
    layers = [torch.cat([torch.tensor(c).unflatten(0, (batch_size, -1)) for c in calls], 1) for calls in one.values()]
    return torch.stack(layers, dim=2)


def test_two_processes_replay_their_own_rollouts(two_processes):
    mode, ranks = two_processes
    tokens = []
    for rank in ranks:
        passes = {}
        for one in rank["passes"]:
            passes.setdefault(one["name"], []).append(one)
        (rollout,) = passes["rollout"]
        source = rollout if mode == "R3" else passes["scored"][0]
        routes = rows_of(source["executed"], 2)
        width = max(map(len, rollout["prompts"]))
        recorded = {}
        for row, (prompt, completion) in enumerate(zip(rollout["prompts"], rollout["completions"], strict=True)):
            rows = slice(width - len(prompt), width + len(completion) - 1)
            recorded[(*[0] * (width - len(prompt)), *prompt, *completion)] = rows, routes[row, rows]
        assert len(passes["update"]) == 2
        for one in passes["update"]:
            executed = rows_of(one["executed"], 2)
            for row, ids in enumerate(one["input_ids"]):
                key = max((key for key in recorded if tuple(ids[: len(key)]) == key), key=len)
                rows, expected = recorded[key]
                assert torch.equal(executed[row, rows].sort(-1).values, expected.sort(-1).values)
        tokens.append(sorted(recorded))
    assert tokens[0] != tokens[1]


def test_two_processes_log_and_learn_as_one(two_processes):
    _, ranks = two_processes
    first, second = ([entry for entry in rank["log"] if "loss" in entry] for rank in ranks)
    assert len(first) == len(second) == 2
    names = [name for name in first[0] if name.startswith(("routing_replay/", "sampling/"))]
    assert len(names) == 10
    for one, other in zip(first, second, strict=True):
        assert one["routing_replay/replayed_frac"] == 1.0
        for name in names:
            assert one.get(name) == other.get(name)  # summed over all processes
    assert first[1]["routing_replay/changed_router_frac"] > 0
    assert ranks[0]["norm"] == ranks[1]["norm"]
