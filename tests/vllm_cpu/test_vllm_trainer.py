"""
GRPO with replay on a real engine: what every update executed, against the engine's record and a Transformers forward.

Legend: P prompt tokens, C completion tokens, T = P + C, D decoder layers, L MoE layers, K experts per token.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import cpu_engine
import numpy as np
import pytest
import torch
from datasets import Dataset
from engines.tiny_chat import VOCAB, conversations, make_tokenizer
from engines.watch import assert_nothing_missing, assert_replayed, wrong_rows
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from vllm_training import (
    Record,
    assert_rows_are_those_of_a_forward,
    by_step,
    make,
    mixtral_checkpoint_names,
    moe_rows,
    train_and_check,
)

from trl_r3 import stitch

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def chat_folder(model_folder, tmp_path_factory):
    """The model with a tokenizer that calls tools; token ids are the same."""
    folder = tmp_path_factory.mktemp("chat")
    for file in model_folder.iterdir():
        (folder / file.name).symlink_to(file)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_colocate(tmp_path, model_folder, engines, colocate):
    trainer = make(tmp_path, model_folder, max_steps=3, routing_replay_compare_every=1, **colocate())
    assert engines.captures, "the trainer did not switch on the capture"
    train_and_check(trainer, engines.records, steps=3)
    logs = [log for log in trainer.state.log_history if "sampling/k3_kl" in log]
    assert len(logs) == 3 and all(log["sampling/k3_kl"] < 1e-9 and "sampling/live/k3_kl" in log for log in logs)


def test_updates_after_the_first_replay_the_same_record(tmp_path, model_folder, engines, colocate):
    trainer = make(tmp_path, model_folder, max_steps=4, num_iterations=2, learning_rate=3e-2, **colocate())
    train_and_check(trainer, engines.records, steps=4)
    last = trainer.updates[-1]
    changed = sum(wrong_rows(rows, trainer.live_rows(tokens, last.weights)) for tokens, rows in last.samples())
    assert changed > 20, "live routing still agrees with the record, so replay shows nothing"


@pytest.mark.parametrize(
    "settings",
    [
        {"vllm_importance_sampling_mode": "token_truncate"},
        {"vllm_importance_sampling_mode": "token_mask"},
        {"vllm_importance_sampling_mode": "sequence_truncate"},
        {"vllm_importance_sampling_mode": "sequence_mask"},
        {"vllm_importance_sampling_correction": False},
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "dapo", "mask_truncated_completions": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_corrections_and_losses_run_with_replay(tmp_path, model_folder, engines, colocate, settings):
    generation = {"generation_kwargs": {"logit_bias": {cpu_engine.EOS: 3.0}}}
    trainer = make(tmp_path, model_folder, **generation, **colocate(), **settings)
    train_and_check(trainer, engines.records)


def test_r2_needs_no_routes_of_the_engine(tmp_path, model_folder, engines, colocate):
    trainer = make(tmp_path, model_folder, routing_replay_mode="R2", num_iterations=2, **colocate())
    assert not engines.captures
    trainer.train()
    first, second = trainer.updates
    assert first.step == 0 and second.step == 1
    for tokens, rows in second.samples():
        assert wrong_rows(rows, trainer.live_rows(tokens, first.weights)) == 0
    assert_nothing_missing(trainer, steps=2)


def test_mixtral(tmp_path, tmp_path_factory, engines, colocate):
    folder = cpu_engine.save_with_tokenizer(cpu_engine.tiny_mixtral(), tmp_path_factory.mktemp("mixtral"))
    trainer = make(tmp_path, folder, **colocate(checkpoint_names=mixtral_checkpoint_names))
    train_and_check(trainer, engines.records, dense=())


def look() -> str:
    """Look up."""
    return "sun moon"


def joined(turns: Sequence[list[Record]], tokens: tuple[int, ...]) -> list[torch.Tensor]:
    """Rows `(T - 1, L, K)` of each of its duplicates: the first turn that fed a token wins."""
    known = [moe_rows(ids) for fed, ids in turns[0] if fed == tokens[: len(fed)]]
    for turn in turns[1:]:
        later = [moe_rows(ids) for fed, ids in turn if fed[: len(tokens)] == tokens[: len(fed)]]
        if later:
            known = [torch.cat([rows, more[len(rows) :]]) for rows in known for more in later]
    return [rows[: len(tokens) - 1] for rows in known]


def test_tool_loop(tmp_path, chat_folder, engines, colocate):
    trainer = make(
        tmp_path,
        chat_folder,
        conversations(["once", "twice", "stop sun", "t70 t71 t72"]),
        tools=[look],
        max_completion_length=32,
        per_device_train_batch_size=16,
        num_generations=4,
        generation_kwargs={"min_tokens": 4, "logit_bias": {cpu_engine.EOS: 4.0, VOCAB["<look>"]: 4.0}},
        **colocate(),
    )
    trainer.train()
    records, expected, made = list(engines.records), {}, []
    for step in (0, 1):
        turns = []
        for turn in (turn for turn in trainer.turns if turn.step == step):
            turns.append(records[: len(turn.prompt_ids)])
            del records[: len(turn.prompt_ids)]
        made.append([len(turn) for turn in turns])
        trained = {tokens for one in trainer.updates if one.step == step for tokens, _ in one.samples()}
        expected[step] = [(tokens, rows) for tokens in trained for rows in joined(turns, tokens)]
    assert not records
    assert all(0 < turns[1] < turns[0] for turns in made), f"no sample went on while another stopped: {made}"
    assert max(map(len, made)) > 2, f"no sample called a tool twice: {made}"
    assert_replayed(trainer, expected)
    assert_rows_are_those_of_a_forward(trainer)
    assert_nothing_missing(trainer, steps=2)


def guess_twice(prompts, trainer):
    """A rollout function of two turns, between which the environment says two words."""
    prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    said = [VOCAB["sun"], VOCAB["moon"]]
    first, one = trainer.rollout_turn(prompt_ids)
    second, two = trainer.rollout_turn(
        [p + list(c) + said for p, c in zip(prompt_ids, first.completion_ids, strict=True)]
    )
    both = list(zip(first.completion_ids, second.completion_ids, strict=True))
    completion_ids = [[*a, *said, *b] for a, b in both]
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "logprobs": [[*a, 0.0, 0.0, *b] for a, b in zip(one, two, strict=True)],
        "env_mask": [[1] * len(a) + [0, 0] + [1] * len(b) for a, b in both],
        "routed_experts": stitch([first, second], prompt_ids, completion_ids, trainer.routing_replay.layout).records,
    }


def test_rollout_func(tmp_path, model_folder, engines, colocate):
    trainer = make(tmp_path, model_folder, rollout_func=guess_twice, max_completion_length=8, **colocate())
    trainer.train()
    calls = [engines.records[i : i + 8] for i in range(0, 32, 8)]
    expected = {
        step: [(tokens, rows) for tokens, _ in calls[2 * step + 1] for rows in joined(calls[2 * step :][:2], tokens)]
        for step in (0, 1)
    }
    assert_replayed(trainer, expected)
    assert_rows_are_those_of_a_forward(trainer)
    assert_nothing_missing(trainer, steps=2)


@pytest.fixture
def server(server_on_cpu, monkeypatch):
    """Settings of a trainer that talks to the server, and what the server answers."""
    from trl.generation.vllm_client import VLLMClient

    answers: list[tuple[int, list[Record]]] = []
    own = VLLMClient._post

    def note(self: Any, url: str, **kwargs: Any) -> dict:
        answer = own(self, url, **kwargs)
        if "choices" in answer:
            records = []
            for choice in answer["choices"]:
                payload = io.BytesIO(base64.b64decode(choice["routed_experts"]))
                tokens = (*choice["prompt_token_ids"], *choice["token_ids"])
                records.append((tokens, np.load(payload, allow_pickle=False)))
            answers.append((len(kwargs["json"]["prompt"]), records))
        return answer

    monkeypatch.setattr(VLLMClient, "_post", note)
    settings = {"vllm_server_base_url": server_on_cpu, "vllm_group_port": cpu_engine.free_port()}
    return {"use_vllm": True, "vllm_mode": "server", **settings}, answers


def test_server(tmp_path, model_folder, server):
    settings, answers = server
    trainer = make(tmp_path, model_folder, **settings)
    trainer.train()
    assert [(prompts, len(records)) for prompts, records in answers] == [(1, 2)] * 8, "one request a prompt"
    expected = {
        turn.step: [(tokens, moe_rows(ids)) for _, records in answers for tokens, ids in records]
        for turn in trainer.turns
    }
    assert_replayed(trainer, expected)
    assert_rows_are_those_of_a_forward(trainer)
    assert_nothing_missing(trainer, steps=2)


def test_a_server_without_the_flag_is_refused(tmp_path, model_folder, server_on_cpu, monkeypatch):
    from trl.generation.vllm_client import VLLMClient

    own = VLLMClient.get_server_info
    info = own(type("Client", (), {"session": __import__("requests").Session(), "base_url": server_on_cpu})())
    cpu_engine.routes_section(info)["enable_return_routed_experts"] = False
    monkeypatch.setattr(VLLMClient, "get_server_info", lambda self: info)
    with pytest.raises(ValueError, match=f"vllm serve {model_folder} --enable-return-routed-experts"):
        make(tmp_path, model_folder, use_vllm=True, vllm_mode="server", vllm_server_base_url=server_on_cpu)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """8 layers, 4 of 32 experts, random."""
    torch.manual_seed(0)
    sizes = {**cpu_engine._SIZES, "num_hidden_layers": 8, "num_experts_per_tok": 4}
    config = Qwen3MoeConfig(**sizes, num_experts=32, moe_intermediate_size=32, norm_topk_prob=True)
    return cpu_engine.save_with_tokenizer(Qwen3MoeForCausalLM(config).eval(), tmp_path_factory.mktemp("wide"))


@pytest.mark.parametrize("training", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ["float32", "bfloat16"])
def test_replay_brings_engine_and_training_together(tmp_path, wide_folder, engines, colocate, engine, training):
    """k3 between the engine and training, replayed and live, on the same tokens."""
    trainer = make(
        tmp_path,
        wide_folder,
        Dataset.from_dict({"prompt": [f"t{i} t{i + 1} t{i + 2}" for i in range(20, 36)]}),
        model_init_kwargs={"dtype": training},
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=48,
        learning_rate=1e-6,
        routing_replay_compare_every=1,
        **colocate(engine),
    )
    trainer.train()
    assert_replayed(trainer, by_step(trainer, engines.records, dense=()))
    logs = [log for log in trainer.state.log_history if "sampling/k3_kl" in log]
    assert len(logs) == 2
    means = {
        name: float(np.mean([log[name] for log in logs]))
        for name in ("sampling/k3_kl", "sampling/live/k3_kl", "sampling/extreme_token_frac")
        + ("sampling/live/extreme_token_frac", "routing_replay/changed_router_frac")
        + ("routing_replay/changed_token_frac",)
    }
    print(f"engine {engine}, training {training}: " + ", ".join(f"{name} {means[name]:.3g}" for name in means))
    replayed, live = means["sampling/k3_kl"], means["sampling/live/k3_kl"]
    if "bfloat16" in (engine, training):
        assert means["routing_replay/changed_router_frac"] > 0.01, "live routing agrees, so replay shows nothing"
        assert replayed <= 0.25 * live
    else:
        assert replayed <= live + 1e-9
