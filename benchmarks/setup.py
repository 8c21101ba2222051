"""Sizes, models and results of the benchmark.

Legend: B batch, T tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from trl_r3.cli.demo.policy import qwen3_config
from trl_r3.routers.router_replay import RouterReplay


@dataclass(frozen=True)
class BenchSettings:
    """
    Sizes of a benchmark.

    Args:
        hidden_size, num_layers, num_experts, top_k (`int`):
            Of the Qwen3-MoE that costs are measured on.
        batch, length (`int`):
            Sequences and tokens of a training step.
        prompts, prompt_length, new_tokens (`int`):
            Of a generation.
        pairs (`int`):
            Number of measurements with and without.
        scored (`int`):
            Sequences of the mismatch.
        alarm_rounds (`int`):
            Number of judgements that are timed.
        trace_rounds (`int`):
            Number of traces that are timed.
        launch_layers, launch_rounds (`int`):
            Layers of the model that sees few tokens, and number of measurements of each way.
        rollout_samples, rollout_tokens (`int`):
            Completions and tokens of the rollout whose records are made.
        vocabulary (`int`), kept (`tuple[int, ...]`), mask_pairs (`int`):
            Tokens of the dense model that sampling masks are measured on, how many of them are kept, and number of
            measurements with and without.
        scored_vocabulary, scored_batches (`int`):
            Tokens of the dense model whose mismatch is measured, and number of its batches of 32 rollouts.
    """

    hidden_size: int = 256
    num_layers: int = 8
    num_experts: int = 128
    top_k: int = 8
    batch: int = 8
    length: int = 256
    prompts: int = 16
    prompt_length: int = 64
    new_tokens: int = 32
    pairs: int = 30
    scored: int = 32
    alarm_rounds: int = 10
    trace_rounds: int = 10
    launch_layers: int = 24
    launch_rounds: int = 200
    rollout_samples: int = 64
    rollout_tokens: int = 1024
    vocabulary: int = 32_768
    kept: tuple[int, ...] = (8, 512)
    mask_pairs: int = 4
    scored_vocabulary: int = 1024
    scored_batches: int = 20


SMOKE = BenchSettings(
    hidden_size=32,
    num_layers=2,
    num_experts=8,
    top_k=2,
    batch=4,
    length=32,
    prompts=2,
    prompt_length=4,
    new_tokens=3,
    pairs=1,
    scored=8,
    launch_layers=2,
    launch_rounds=2,
    vocabulary=64,
    kept=(4,),
    mask_pairs=1,
    scored_vocabulary=64,
    scored_batches=1,
)


@dataclass
class Finding:
    """One line of the table; `target` is an upper bound, where there is one."""

    what: str
    value: float
    target: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the value is within its target."""
        return None if self.target is None else self.value <= self.target


def in_turn(parts: dict[str, Callable[[], list[Finding]]]) -> list[Finding]:
    """What all parts find, by name; which of them runs is said on standard error, by no thread of its own."""
    findings = []
    for number, (name, part) in enumerate(parts.items(), 1):
        print(f"{number} of {len(parts)}: {name}", file=sys.stderr, flush=True)
        findings += part()
    return findings


def large_model(settings: BenchSettings) -> Any:
    """The Qwen3-MoE that costs are measured on, with random weights."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        moe_intermediate_size=settings.hidden_size // 4,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.top_k,
        norm_topk_prob=True,
        max_position_embeddings=512,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config)


def small_model() -> Any:
    """The Qwen3-MoE of `trl-r3 demo`, with random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(qwen3_config())


def random_ids(model: Any, batch: int, length: int) -> Tensor:
    """(B, T) input ids, the same at every call."""
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def record_of(model: Any, replay: RouterReplay, ids: Tensor) -> Tensor:
    """(B, T, L, K) ids that the model selects in one forward."""
    with torch.no_grad(), replay.record() as recorded:
        model(input_ids=ids, use_cache=False)
    return recorded.routed_experts
