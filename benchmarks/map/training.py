"""One run: a cell and a seed, as the line that is kept of it."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

from trl_r3 import R3GRPOConfig
from trl_r3.cli.demo.policy import Sum, accuracy, build_tokenizer
from trl_r3.cli.demo.run import exact_answer
from trl_r3.cli.demo.settings import of_small_runs

from .cells import ARMS, Arm, Cell, Setting, Sizes
from .model import gates, split, start
from .trainer import MapTrainer

_WARM_UP_STEPS = 4  # of the learning rate

LOGGED = {
    "reward": "reward",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "grad_norm": "grad_norm",
    "aux_loss": "aux_loss",
    "clip_ratio/region_mean": "clipped",
    "routing_replay/changed_router_frac": "changed_in_updates",
}
MEASURED = {
    "live/k3_kl": "k3_live",
    "replay/k3_kl": "k3_replay",
    "live/extreme_token_frac": "F2_live",
    "replay/extreme_token_frac": "F2_replay",
    "live/changed_router_frac": "changed_routers",
}


class _Evaluations(TrainerCallback):
    """Accuracy of the greedy policy, without the numerics of the rollout, every so many steps."""

    def __init__(self, every: int, held_out: list[Sum]):
        self.every = every
        self.held_out = held_out
        self.accuracies: list[float] = []

    def on_step_end(self, args, state, control, model, processing_class, **kwargs):
        if state.global_step % self.every == 0:
            self.accuracies.append(accuracy(model, processing_class, self.held_out))


def run(cell: Cell, seed: int, sizes: Sizes, starts: Path) -> dict[str, Any]:
    """
    Train once.

    Args:
        cell ([`Cell`]):
            Setting and arm.
        seed (`int`):
            Of start, split, sampling and noise: runs of one seed are paired.
        sizes ([`Sizes`]):
            Of the run.
        starts (`Path`):
            Folder of the warmed-up models.

    Returns:
        `dict`: Cell, seed, accuracies, means of the last quarter of what TRL logs, means of what was measured, and
        processor seconds. `null` stands for what an arm does not have, or for what is no finite number.
    """
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    disable_progress_bars()
    begin = time.process_time()
    arm, (train, held_out) = ARMS[cell.arm], split(sizes, seed)
    tokenizer, model = build_tokenizer(), start(cell.setting.gate, sizes, seed, starts)
    if arm.freezes_routers:
        for gate in gates(model):
            gate.requires_grad_(False)
    before = accuracy(model, tokenizer, held_out)
    evaluations = _Evaluations(sizes.evaluate_every, held_out)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = MapTrainer(
            model=model,
            args=_config(scratch, cell.setting, arm, sizes, seed),
            reward_funcs=exact_answer,
            train_dataset=Dataset.from_list([{"prompt": each.prompt, "answer": each.answer} for each in train]),
            processing_class=tokenizer,
            callbacks=[evaluations],
            measure_every=sizes.measure_every,
            rollout=cell.setting.rollout,
            arm=arm,
            noise_seed=seed,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    measured = trainer.measured
    if arm.mode == "R2":  # its record is that of the training model, and says nothing of the rollout's experts
        measured = [{name: each[name] for name in ("live/k3_kl", "live/extreme_token_frac")} for each in measured]
    last = [entry for entry in log if entry["step"] > cell.setting.steps * 3 // 4]
    return {
        **cell.as_dict(),
        "seed": seed,
        "before": before,
        "accuracies": [round(each, 4) for each in evaluations.accuracies],
        **{short: _mean(last, name) for name, short in LOGGED.items()},
        **{short: _mean(measured, name) for name, short in MEASURED.items()},
        "changed_at_start": _mean(measured[:1], "live/changed_router_frac"),
        "grad_norm_max": rounded(max(entry["grad_norm"] for entry in log)),
        "seconds": round(time.process_time() - begin, 2),
    }


def _config(folder: str, setting: Setting, arm: Arm, sizes: Sizes, seed: int) -> R3GRPOConfig:
    return R3GRPOConfig(
        folder,
        use_routing_replay=arm.mode is not None,
        routing_replay_mode=arm.mode or "R3",
        routing_replay_gating="intercept",
        per_device_train_batch_size=sizes.prompts * sizes.generations,
        steps_per_generation=setting.updates,
        num_generations=sizes.generations,
        max_completion_length=len(str(2 * sizes.largest)) + 1,
        max_steps=setting.steps,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=_WARM_UP_STEPS,
        **of_small_runs(seed),
    )


def _mean(entries: list[dict[str, float]], name: str) -> float | None:
    values = [entry[name] for entry in entries if name in entry]
    return rounded(statistics.fmean(values)) if values else None


def rounded(value: float) -> float | None:
    """Four digits; `None` for what is no finite number."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
