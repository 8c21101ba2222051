"""Two mixtures of experts of about 0.2 million parameters, warmed up once a gate and seed."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Glm4MoeLiteConfig, PreTrainedConfig, Qwen3MoeConfig

from trl_r3.cli.demo.policy import CHARACTERS, Sum, accuracy, build_tokenizer, make_sums, warm_up

from .cells import Sizes

HIDDEN = 48
_BIAS = 0.1  # standard deviation of the sigmoid gate's bias, which no training here moves

_SHARED: dict[str, Any] = {
    "vocab_size": 1 + len(CHARACTERS),
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "initializer_range": HIDDEN**-0.5,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def config(gate: str) -> PreTrainedConfig:
    """Four layers, the first of them dense, 16 experts, top-2."""
    if gate == "softmax":
        return Qwen3MoeConfig(**_SHARED, num_experts=16, mlp_only_layers=[0])
    latent = {"q_lora_rank": 24, "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
    return Glm4MoeLiteConfig(
        **_SHARED, **latent, n_routed_experts=16, n_shared_experts=1, mlp_layer_types=["dense"] + ["sparse"] * 3
    )


def gates(model: nn.Module) -> list[nn.Module]:
    """The routers, in either model."""
    return [module for name, module in model.named_modules() if name.endswith("mlp.gate")]


def split(sizes: Sizes, seed: int) -> tuple[list[Sum], list[Sum]]:
    """Sums to train on, and sums that no training sees."""
    sums = make_sums(sizes.largest)
    random.Random(seed).shuffle(sums)
    return sums[sizes.held_out :], sums[: sizes.held_out]


def start(gate: str, sizes: Sizes, seed: int, folder: Path) -> Any:
    """
    The model that every run of a gate and seed starts from.

    Args:
        gate (`str`):
            `"softmax"` or `"sigmoid"`.
        sizes ([`Sizes`]):
            Of the warm-up.
        seed (`int`):
            Of weights, split and draws.
        folder (`Path`):
            Where its weights are kept for the next run.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(gate))
    for module in gates(model):
        for bias in module.buffers():
            bias.normal_(std=_BIAS)
    path = folder / f"{gate}-{seed}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model
    _warm_up_to(sizes.start_accuracy, model, sizes, seed)
    folder.mkdir(parents=True, exist_ok=True)
    own = path.with_suffix(f".{os.getpid()}")  # another process may want the same start
    save_file(model.state_dict(), own)
    own.replace(path)
    return model


class _Reached(Exception):
    """The warm-up is long enough."""


def _warm_up_to(target: float, model: Any, sizes: Sizes, seed: int) -> None:
    # learning to add comes suddenly, and when differs between seeds: a number of steps would not do
    tokenizer, (train, held_out) = build_tokenizer(), split(sizes, seed)
    steps = 0

    def check() -> None:
        nonlocal steps
        steps += 1
        if steps % 10 == 0 and accuracy(model, tokenizer, held_out) >= target:
            raise _Reached

    with suppress(_Reached):
        warm_up(
            model,
            tokenizer,
            train,
            steps=sizes.warm_up_steps,
            batch_size=sizes.warm_up_batch,
            learning_rate=sizes.warm_up_learning_rate,
            seed=seed,
            on_step=check,
        )
        raise RuntimeError(f"{sizes.warm_up_steps} steps of warm-up did not bring accuracy to {target}. Allow more.")
