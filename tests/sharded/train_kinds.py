"""
Trainings of the other trainers, and of GRPO with tools, for a launch: a rank watches the student that it trains.

Legend: T tokens of a sequence, L MoE layers, K experts per token.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset
from engines.script import again, big, deep, look, scripted
from engines.tiny_chat import by_position, conversations, make_tokenizer
from peft import LoraConfig
from sharded.train_sharded import let_accelerate_read_fsdp
from trainers.runs import SHORT
from trainers.students import ForwardWatch, assistant, user, wrong_rows

import trl_r3

PROMPTS = [f"t{30 + i} t{50 + i}" + f" t{70 + i}" * (i % 3) for i in range(16)]
OF_GROUPS = {"num_generations": 2, "num_iterations": 2}
KINDS: dict[str, dict[str, Any]] = {
    "RLOO": {**OF_GROUPS, "beta": 0.0},
    "GMPO": OF_GROUPS,
    "GRPO": {**OF_GROUPS, "generation_kwargs": scripted(), "max_completion_length": 16},
    "SDPO": {**OF_GROUPS, "teacher_model_kind": "live"},
    "Distillation": {},
    "IWOPD": {"max_length": 64, "top_p": 1.0},
}


class Room:
    """An environment with two of the script's tools."""

    def reset(self, **kwargs: Any) -> None:
        """Nothing is left from before."""

    def look(self) -> str:
        """Look up."""
        return look()

    def again(self) -> str:
        """Look again."""
        return again()


def who_teaches(kind: str, folder: Path) -> dict[str, Any]:
    """Data, and what tells a student what is good: a reward, or another model."""
    if kind == "GRPO":
        data = conversations(["once", "twice", "stop", "wait"] * 4)
        return {"train_dataset": data, "reward_funcs": by_position, "environment_factory": Room, "tools": [deep, big]}
    if kind == "IWOPD":
        data = Dataset.from_dict({"messages": [[user(prompt), assistant("t7")] for prompt in PROMPTS]})
        return {"train_dataset": data, "teacher_model": str(folder / "teacher")}
    data = Dataset.from_dict({"prompt": PROMPTS})
    teacher = {"teacher_model": str(folder / "teacher")} if kind == "Distillation" else {"reward_funcs": by_position}
    return {"train_dataset": data, **teacher}


def make_trainer(kind: str, folder: Path, name: str, lora: bool) -> Any:
    settings = {
        **SHORT,
        "learning_rate": 3e-2,
        "gradient_checkpointing": False,
        "use_routing_replay": True,
        "routing_replay_alarm": "off",  # the rollouts fit no tokens
        "model_init_kwargs": {"dtype": "float32"},
        **KINDS[kind],
    }
    args = getattr(trl_r3, f"R3{kind}Config")(str(folder / name), **settings)
    let_accelerate_read_fsdp()
    return getattr(trl_r3, f"R3{kind}Trainer")(
        model=str(folder / "model"),
        args=args,
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False) if lora else None,
        **who_teaches(kind, folder),
    )


def turn_rollouts(model: Any) -> None:
    """Let whatever a model generates come from routers that see the opposite, and select quite other experts."""
    own = model.generate
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]

    def generate(*args, **kwargs):
        hooks = [gate.register_forward_pre_hook(lambda gate, args: (-args[0], *args[1:])) for gate in gates]
        try:
            return own(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    model.generate = generate


def run(folder: Path, name: str, options: list[str]) -> dict[str, Any]:
    """What a rank reports: (row, layer) pairs that an update executed otherwise than its rollout did, and the log."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--lora", action="store_true")
    given = parser.parse_args(options)
    trainer = make_trainer(given.kind, folder, name, given.lora)
    turn_rollouts(trainer.accelerator.unwrap_model(trainer.model))
    watch = ForwardWatch(trainer.model, live=False)
    trainer.train()
    rollout = watch.rollout()
    samples = [sample for one in watch.updates for sample in one.samples(one.calls)]  # (T - 1, L, K) each
    report = {
        "kind": trainer.accelerator.distributed_type.value,
        "processes": trainer.accelerator.num_processes,
        "updates": len(watch.updates),
        "prefills": sum(one.generates and one.input_ids.shape[1] > 1 for one in watch.forwards),
        "samples": sorted(tokens for tokens, _ in samples),
        "rows": sum(rows[..., 0].numel() for _, rows in samples),
        "wrong": sum(wrong_rows(sample, rollout) for sample in samples),
        "wrong by a token": sum(wrong_rows((tokens, rows.roll(1, 0)), rollout) for tokens, rows in samples),
        "log": [log for log in trainer.state.log_history if "loss" in log],
    }
    trainer.accelerator.free_memory()
    return report
