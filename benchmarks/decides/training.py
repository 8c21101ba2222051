"""One run: a cell and a seed, as the line that is kept of it."""

from __future__ import annotations

import os
import platform
import tempfile
import time
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PrinterCallback
from transformers.utils import logging

from benchmarks.map.training import rounded
from trl_r3 import R3GRPOConfig
from trl_r3.cli.demo.settings import of_small_runs
from trl_r3.cli.demo.sorting import (
    all_right,
    draw_batch,
    make_rows,
    share_sorted,
    sorting_config,
    sorting_tokenizer,
)

from .cells import ARMS, Arm, Cell, Setting, Sizes
from .trainer import DecidingTrainer
from .warm_up import warm_up_sorting

AVERAGED = {"reward": "reward", "entropy": "entropy", "grad_norm": "grad_norm"}
MEASURED = {
    "live/k3_kl": "k3_live",
    "replay/k3_kl": "k3_replay",
    "live/extreme_token_frac": "F2_live",
    "replay/extreme_token_frac": "F2_replay",
    "live/changed_router_frac": "changed_routers",
}
_OF_ROUTES = ("k3_replay", "F2_replay", "changed_routers")


def start(setting: Setting, sizes: Sizes, seed: int, folder: Path) -> Any:
    """
    The warmed-up model that every run of a kind of model, a length and a seed starts from.

    Args:
        setting ([`Setting`]):
            Of the run.
        sizes ([`Sizes`]):
            How good it is to be.
        seed (`int`):
            Of weights and draws.
        folder (`Path`):
            Where its weights are kept for the next run.
    """
    torch.manual_seed(seed)
    config = sorting_config(setting.top_k)
    config.num_experts = setting.experts
    config.max_position_embeddings = max(config.max_position_embeddings, 2 * setting.length + 1)
    model = AutoModelForCausalLM.from_config(config)
    model.set_experts_implementation("grouped_mm")  # the fastest at this size
    path = folder / f"{setting.experts}-{setting.top_k}-{setting.length}-{seed}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model
    warm_up_sorting(model, setting.length, sizes.start_share, seed)
    folder.mkdir(parents=True, exist_ok=True)
    own = path.with_suffix(f".{os.getpid()}")  # another process may want the same start
    save_file(model.state_dict(), own)
    own.replace(path)
    return model


def run(cell: Cell, seed: int, sizes: Sizes, starts: Path) -> dict[str, Any]:
    """
    Train once.

    Args:
        cell ([`Cell`]):
            Setting and arm.
        seed (`int`):
            Of start, prompts, sampling and noise: runs of one seed are paired.
        sizes ([`Sizes`]):
            Of the run.
        starts (`Path`):
            Folder of the warmed-up models.

    Returns:
        `dict`: Cell, seed, share of rows that greedy decoding sorts before and after, means of what TRL logs over
        every ten steps, what was measured every twenty, processor seconds, date, machine and versions.
    """
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    disable_progress_bars()
    model = start(cell.setting, sizes, seed, starts)
    begin, arm = time.process_time(), ARMS[cell.arm]
    if arm.freezes_routers:
        for layer in model.model.layers:
            layer.mlp.gate.requires_grad_(False)
    held_out = draw_batch(sizes.held_out, cell.setting.length, torch.Generator().manual_seed(1000 + seed))
    before = share_sorted(model, held_out)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = _trainer(model, scratch, cell.setting, arm, sizes, seed)
        trainer.train()
    return {
        **cell.as_dict(),
        "seed": seed,
        "before": rounded(before),
        "after": rounded(share_sorted(model, held_out)),
        **_series(trainer, arm, sizes),
        "seconds": round(time.process_time() - begin, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }


def _trainer(model: Any, folder: str, setting: Setting, arm: Arm, sizes: Sizes, seed: int) -> DecidingTrainer:
    rows = make_rows(sizes.prompts * setting.steps, setting.length, seed)
    trainer = DecidingTrainer(
        model=model,
        args=_config(folder, setting, arm, sizes, seed),
        reward_funcs=all_right,
        train_dataset=Dataset.from_list(rows),
        processing_class=sorting_tokenizer(),
        measure_every=sizes.measure_every,
        rollout=setting.rollout,
        arm=arm,
        noise_seed=seed,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _config(folder: str, setting: Setting, arm: Arm, sizes: Sizes, seed: int) -> R3GRPOConfig:
    return R3GRPOConfig(
        folder,
        use_routing_replay=arm.mode is not None,
        routing_replay_mode=arm.mode or "R3",
        routing_replay_gating="op" if arm.shifts else "intercept",
        routing_replay_shift_weight=arm.shifts,
        per_device_train_batch_size=sizes.prompts * sizes.generations,
        steps_per_generation=setting.updates,
        num_generations=sizes.generations,
        max_completion_length=setting.length,
        max_steps=setting.steps,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="constant",
        epsilon_high=0.27,
        vllm_importance_sampling_mode=arm.correction or "sequence_mask",
        vllm_importance_sampling_clip_max=arm.clip_max,
        **of_small_runs(seed),
    )


def _series(trainer: DecidingTrainer, arm: Arm, sizes: Sizes) -> dict[str, list[float | None]]:
    log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    parts = [log[start : start + sizes.average_over] for start in range(0, len(log), sizes.average_over)]
    averaged = {
        short: [_mean([entry[name] for entry in part if name in entry]) for part in parts]  # rewards: once a rollout
        for name, short in AVERAGED.items()
    }
    measured = {
        # the record of R2 is that of the training model, and says nothing of the rollout's experts
        short: [None if arm.mode == "R2" and short in _OF_ROUTES else rounded(each[name]) for each in trainer.measured]
        for name, short in MEASURED.items()
    }
    return {**averaged, "measured_at": [each["step"] for each in trainer.measured], **measured}


def _mean(values: list[float]) -> float | None:
    return rounded(fmean(values)) if values else None
