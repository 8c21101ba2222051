"""Trainings on two processes, one launch for three test files: what each rank notes, how it fails, what it traces."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sharded.launching import TORCHRUN, Case, Launch, Results, shared_folder
from trainers.watching import EOS, PAD, VOCAB, make_tokenizer
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_r3 import R3GRPOConfig, R3GRPOTrainer
from trl_r3.cli.experts import watched_experts

MODES = ["R3", "R2"]
ERRORS = ["missing", "wrong", "short"]
TRACES = "traces"
BUFFER = "buffer"


def launched(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Reports of all cases, by mode, error, and `TRACES`; whatever they write is in a folder of that name."""
    cases = [Case(name, "trainers.two_processes", []) for name in (*MODES, *ERRORS, TRACES, BUFFER)]
    return Results(shared_folder(tmp_path_factory, "two_processes"), {"torchrun": Launch(TORCHRUN, cases)})


def run(folder: Path, name: str, options: list[str]) -> dict[str, Any]:
    """What a rank reports."""
    (folder / name).mkdir(exist_ok=True)
    if name in MODES:
        return noted(folder / name, name)
    if name == BUFFER:
        return buffered(folder / name)
    return traced(folder / name) if name == TRACES else error_of(folder / name, name)


def make_model(layers: int, experts: int, top_k: int, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
            num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
            num_experts=experts, num_experts_per_tok=top_k, initializer_range=0.2,
            eos_token_id=EOS, pad_token_id=PAD, **settings,
        )
    )  # fmt: skip


def make_trainer(trainer_class: type, model: PreTrainedModel, folder: Path, prompts: list[str], reward, **settings):
    """One with replay; what is no setting of its config is an argument of its own."""
    own = {name: settings.pop(name) for name in ("rollout_func",) if name in settings}
    return trainer_class(
        model=model,
        args=R3GRPOConfig(
            str(folder), use_cpu=True, bf16=False, save_strategy="no", report_to=[], disable_tqdm=True,
            use_routing_replay=True, **settings,
        ),
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": prompts * 4}),
        processing_class=make_tokenizer(),
        **own,
    )  # fmt: skip


def characters(completions, **kwargs):
    return [float(len(set(text))) for text in completions]


class Noting(R3GRPOTrainer):
    """Notes what the experts execute in each pass."""

    def __init__(self, model, **kwargs):
        self.passes, self.executed = [], {}
        super().__init__(model, **kwargs)
        self.watch = watched_experts(model, self._note)
        self.watch.__enter__()

    def _note(self, layer, ids):
        self.executed.setdefault(layer, []).append(ids.tolist())

    def _noted(self, name, function, *args, **kwargs):
        self.executed = {}
        result = function(*args, **kwargs)
        self.passes.append({"name": name, "executed": self.executed})
        return result

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        generated = self._noted("rollout", super()._generate_single_turn, prompt_ids, *args, **kwargs)
        self.passes[-1] |= {"prompts": prompt_ids, "completions": generated[0]}
        return generated

    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, **kwargs):
        name = "update" if torch.is_grad_enabled() else "scored"
        scored = self._noted(name, super()._get_per_token_logps_and_entropies, model, input_ids, *args, **kwargs)
        self.passes[-1] |= {"input_ids": input_ids.tolist()}
        return scored


def noted(folder: Path, mode: str) -> dict[str, Any]:
    """All passes of two updates on one rollout, what was logged, and what became of the weights."""
    model = make_model(3, 16, 4, mlp_only_layers=[1], norm_topk_prob=True)
    trainer = make_trainer(
        Noting, model, folder, ["1+2=", "abcdefg", "x", "hello"],
        lambda completions, **kwargs: [len(set(text)) + 0.1 * i for i, text in enumerate(completions)],
        per_device_train_batch_size=2, num_generations=4, num_iterations=2, max_completion_length=6, max_steps=2,
        learning_rate=1e-2, logging_steps=1, routing_replay_mode=mode, routing_replay_compare_every=1,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        generation_kwargs={"sequence_bias": [[[EOS], 2.0]], "suppress_tokens": [PAD]},
    )  # fmt: skip
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == [""]
    norm = sum(weight.double().pow(2).sum() for weight in model.parameters()).item()
    return {"passes": trainer.passes, "log": trainer.state.log_history, "norm": norm}


class Buffering(R3GRPOTrainer):
    """A replay buffer, in which the second process alone finds samples of an earlier batch."""

    kept_rollouts = 1

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        before, self.before = getattr(self, "before", None), batch
        return before if before is not None and self.accelerator.process_index == 1 else batch


def buffered(folder: Path) -> dict[str, Any]:
    """How far it came."""
    trainer = make_trainer(
        Buffering, make_model(2, 8, 2, max_position_embeddings=128), folder, ["1+2=", "abcdefgh", "x", "hello"],
        characters, per_device_train_batch_size=4, num_generations=2, max_completion_length=8, max_steps=3,
        ddp_timeout=60,
    )  # fmt: skip
    trainer.train()
    return {"steps": trainer.state.global_step}


def play(kind: str, prompts, trainer):
    """The policy's own rollout; on the second process its record is not as it should be."""
    prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    turn, logprobs = trainer.rollout_turn(prompt_ids)
    records = list(turn.records)
    if trainer.accelerator.process_index == 1:
        if kind == "missing":
            records[0] = torch.full_like(records[0], 255)
        elif kind == "wrong":
            records = [record.roll(1, 1) for record in records]
        elif kind == "short":
            records[0] = records[0][:-3]
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": turn.completion_ids,
        "logprobs": logprobs,
        "routed_experts": records,
    }


def error_of(folder: Path, kind: str) -> dict[str, Any]:
    """The text with which `train()` ends, if it raises."""
    trainer = make_trainer(
        R3GRPOTrainer, make_model(2, 8, 2, max_position_embeddings=128), folder,
        ["1+2=3abc", "abcdefgh", "xyz(a,b)", "hello yo"], characters,
        per_device_train_batch_size=8, num_generations=4, max_completion_length=48, max_steps=1, ddp_timeout=60,
        generation_kwargs={"suppress_tokens": [PAD, EOS]}, rollout_func=partial(play, kind),
    )  # fmt: skip
    try:
        trainer.train()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".replace("\n", " ")}
    return {"error": None}


def traced(folder: Path) -> dict[str, Any]:
    """How far a run came, and what it warned of its traces; its model is left beside them."""
    model, traces = make_model(2, 8, 2, max_position_embeddings=128), folder / "traces"
    traces.mkdir(exist_ok=True)
    if int(os.environ["RANK"]) == 0:
        model.save_pretrained(folder / "model")
    else:
        # on the second process the disk is full from step 1 on
        (traces / "step-00000001-rank-00001.part").symlink_to("/dev/full")
    trainer = make_trainer(
        R3GRPOTrainer, model, folder, ["1+2=", "abcdefgh", "x", "hello"], characters,
        per_device_train_batch_size=4, num_generations=2, max_completion_length=8, max_steps=3, ddp_timeout=60,
        routing_replay_trace_dir=str(traces), learning_rate=1e-2,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(each.message) for each in caught if "tracing" in str(each.message)]
    return {"steps": trainer.state.global_step, "told": told}
