"""Students whose rollouts a vLLM server makes: each update goes through the routes that came with the answer."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from engines.fake_vllm import fake_vllm, routes_of
from engines.tiny_chat import make_tokenizer, tiny_qwen3_moe
from trainers.students import CONFIGS, TRAINERS, ForwardWatch, assert_updates_replay, assistant, user
from trl.experimental.iw_opd import iw_opd_trainer
from trl.trainer import distillation_trainer

from trl_r3.cli.experts import experts_of

WORDS = ["t30 t31 t32", "t40", "t50 t51 t52 t53", "t60 t61"]
OWN = {
    "distillation": {},
    "sdpo": {"num_generations": 2, "teacher_model_kind": "base"},
    "iw_opd": {"max_length": 64, "top_p": 1.0},
}


def student(kind, fake, folder, **changes):
    model = tiny_qwen3_moe()
    make_tokenizer().save_pretrained(folder / "policy")
    model.save_pretrained(folder / "policy")  # where TRL looks for a copy, or for the tokenizer of a teacher
    model = type(model).from_pretrained(folder / "policy")
    settings = {
        "use_routing_replay": True,
        "routing_replay_alarm": "off",  # routes that nobody computed fit no tokens
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": fake.base_url,
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 12,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    given = {"teacher_model": type(model).from_pretrained(folder / "policy")}
    if kind == "sdpo":
        given = {"reward_funcs": lambda completions, **kwargs: [1.0] * len(completions)}
    data = Dataset.from_dict({"prompt": WORDS * 4})
    if kind == "iw_opd":
        data = Dataset.from_dict({"messages": [[user(each), assistant("t7")] for each in WORDS * 4]})
    return TRAINERS[kind](
        model=model,
        args=CONFIGS[kind](str(folder / "out"), **{**settings, **OWN[kind], **changes}),
        train_dataset=data,
        processing_class=make_tokenizer(),
        **given,
    )


@pytest.fixture(autouse=True)
def as_if_installed(weightless, monkeypatch):
    for module in (distillation_trainer, iw_opd_trainer):
        monkeypatch.setattr(module, "is_vllm_available", lambda *args, **kwargs: True)


@pytest.mark.parametrize("kind", sorted(TRAINERS))
def test_updates_replay_what_the_server_recorded(tmp_path, kind):
    with fake_vllm() as fake:
        trainer = student(kind, fake, tmp_path, gradient_accumulation_steps=2)
        watch = ForwardWatch(trainer.model)
        trainer.train()
    layers = sorted(experts_of(trainer.model))
    samples = [tokens for one in watch.updates for tokens, _ in one.samples(one.calls)]
    recorded = [(tokens, torch.from_numpy(routes_of(tokens)[:, layers].copy()).long()) for tokens in samples]
    assert len(watch.updates) == 4
    assert_updates_replay(watch, recorded)
    logged = [entry for entry in trainer.state.log_history if "routing_replay/replayed_frac" in entry]
    assert [entry["routing_replay/replayed_frac"] for entry in logged] == [1.0, 1.0]


@pytest.mark.parametrize("kind", sorted(TRAINERS))
def test_a_server_that_sends_no_routes_ends_the_first_step(tmp_path, kind):
    with fake_vllm(returns_routes=False) as fake:
        trainer = student(kind, fake, tmp_path)
        with pytest.raises(ValueError, match="no `routed_experts`"):
            trainer.train()
    assert trainer.state.global_step == 0
