"""Models, settings and watched trainers for a run of a second: fixtures of every folder whose tests train."""

import copy
import warnings

import pytest
import torch
from datasets import Dataset
from trainers.watching import (
    EOS,
    PAD,
    PROMPTS,
    VOCAB,
    Check,
    Watching,
    distinct_characters,
    make_tokenizer,
    rounded_weights,
    scrambled_routers,
)
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback
from trl import GRPOTrainer

from trl_r3 import R3GRPOConfig, R3GRPOTrainer
from trl_r3.traces.trace_file import find_traces

CHECKPOINTING = {
    "none": {"gradient_checkpointing": False},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}
# of a run of a second on a CPU
SHORT = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
    "max_steps": 2,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "log_level": "error",
}
OLD_POLICY = {"num_iterations": 2, "max_steps": 3}  # TRL scores the old policy itself


@pytest.fixture
def qwen3():
    """Builds a Qwen3-MoE with a dense layer between its MoE layers."""

    def build(seed=0, **settings):
        torch.manual_seed(seed)
        shape = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 32,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        }
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**shape, **settings}))

    return build


@pytest.fixture
def settings(tmp_path):
    """Makes a config for a run of a second."""

    def make(**changes):
        small = {
            "output_dir": str(tmp_path / "out"),
            **SHORT,
            "num_generations": 2,
            "learning_rate": 1e-3,
            "use_routing_replay": True,
            # ends come early now and then, and padding is never sampled
            "generation_kwargs": {"sequence_bias": [[[EOS], 2.0]], "suppress_tokens": [PAD]},
        }
        return R3GRPOConfig(**{**small, **changes})

    return make


@pytest.fixture
def build(settings):
    """Builds a watched trainer."""

    def make(
        model,
        *,
        trainer_class=R3GRPOTrainer,
        reward=distinct_characters,
        prompts=PROMPTS,
        while_generating=None,
        **changes,
    ):
        passed = (
            "peft_config",
            "eval_dataset",
            "callbacks",
            "reward_processing_classes",
            "rollout_func",
            "processing_class",
        )
        extra = {name: changes.pop(name) for name in passed if name in changes}
        bases = (Watching,) if trainer_class is GRPOTrainer else (trainer_class, Watching)
        body = {} if while_generating is None else {"while_generating": staticmethod(while_generating)}
        return type("Watched" + trainer_class.__name__, bases, body)(
            model=model,
            args=settings(**changes),
            reward_funcs=reward,
            train_dataset=Dataset.from_dict({"prompt": prompts * 4}),
            **{"processing_class": make_tokenizer(), **extra},
        )

    return make


@pytest.fixture
def train(build):
    """Builds a watched trainer and trains."""

    def run(model, **kwargs):
        trainer = build(model, **kwargs)
        trainer.train()
        return trainer

    return run


@pytest.fixture
def gap():
    """Ways in which a rollout engine differs from training: arguments for `while_generating`."""
    return {"rounded": rounded_weights, "scrambled": scrambled_routers}


@pytest.fixture
def check():
    return Check()


class Weights(TrainerCallback):
    """Keeps the weights of each step."""

    def __init__(self):
        self.at = {}

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.at[state.global_step] = copy.deepcopy(model.state_dict())


@pytest.fixture
def traced(train, tmp_path):
    """Trains with traces: the trainer, its traces and the weights of each step."""

    def run(model, **changes):
        weights = Weights()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "tracing ends")
            trainer = train(model, callbacks=[weights], routing_replay_trace_dir=str(tmp_path / "traces"), **changes)
        return trainer, find_traces(tmp_path / "traces"), weights.at

    return run
