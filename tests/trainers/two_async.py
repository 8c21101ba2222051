"""Asynchronous GRPO on two processes, of which the first has the server, the queue and all records that wait."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from engines.fake_vllm import serving
from engines.model_server import CopiedWeights, ModelServer
from engines.tiny_chat import make_tokenizer, tiny_qwen3_moe
from peft import LoraConfig
from trainers.async_runs import ThreadedWorker, count_wrong, make_trainer, without_gpu
from trl.experimental.async_grpo import async_grpo_trainer

from trl_r3.trainers.async_queue import WaitingRows

MOE_LAYERS = [0, 2, 3]


def run(folder: Path, name: str, options: list[str]) -> dict[str, Any]:
    """What a rank reports of a training, or of its error."""
    without_gpu(setattr)
    async_grpo_trainer.AsyncRolloutWorker = ThreadedWorker
    rank = os.environ["RANK"]
    own = folder / f"{name} {rank}"
    tiny_qwen3_moe().save_pretrained(own / "model")
    make_tokenizer().save_pretrained(own / "model")
    server = ModelServer()
    server.start(tiny_qwen3_moe(), returns_routes="--fails" not in options)
    with serving(server) if rank == "0" else nullcontext():
        return trained(own, server, "--lora" in options)


def trained(folder: Path, server: ModelServer, lora: bool) -> dict[str, Any]:
    held = watch_held_rows()
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False) if lora else None
    try:
        trainer = make_trainer(
            server, folder / "model", folder / "out", transfer=CopiedWeights(server), routing_replay_alarm="off",
            per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, ddp_timeout=60,
            peft_config=adapter,
        )  # fmt: skip
        trainer.train()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    answers = [server.answers]
    torch.distributed.broadcast_object_list(answers)
    wrong, total = count_wrong(trainer.forwards, answers[0], MOE_LAYERS)
    changed = [log.get("routing_replay/changed_router_frac") for log in trainer.state.log_history]
    log = [entry for entry in trainer.state.log_history if "routing_replay/replayed_frac" in entry]
    return {
        "wrong": wrong,
        "total": total,
        "changed": [each for each in changed if each is not None],
        "log": [{key: value for key, value in entry.items() if key.startswith("routing_replay")} for entry in log],
        "tokens": [one.tokens.tolist() for one in trainer.forwards],
        "held": held.most,
    }


def watch_held_rows() -> SimpleNamespace:
    """How many rows wait on this process at most."""
    held, own = SimpleNamespace(most=0), WaitingRows.add

    def add(self, rows):
        numbers = own(self, rows)
        held.most = max(held.most, len(self._rows))
        return numbers

    WaitingRows.add = add
    return held
