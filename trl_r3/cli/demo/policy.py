"""A small mixture of experts, a tokenizer of single characters, and sums for both to learn."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import MixtralConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

END = "<end>"
CHARACTERS = "0123456789+="

_SHARED: dict[str, Any] = {
    "vocab_size": 1 + len(CHARACTERS),
    "hidden_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 96**-0.5,  # keeps the scale of what the weights act on
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def qwen3_config() -> Qwen3MoeConfig:
    """Eight layers, the first of them dense, 32 experts, top-4: 3.4 million parameters."""
    return Qwen3MoeConfig(
        **_SHARED,
        intermediate_size=192,
        moe_intermediate_size=48,
        num_experts=32,
        num_experts_per_tok=4,
        mlp_only_layers=[0],
        norm_topk_prob=True,
    )


def mixtral_config() -> MixtralConfig:
    """Eight layers, 16 experts, top-2: 3.8 million parameters."""
    return MixtralConfig(**_SHARED, intermediate_size=96, num_local_experts=16, num_experts_per_tok=2)


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {"qwen3": qwen3_config, "mixtral": mixtral_config}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, padded on the left with the token that ends an answer."""
    vocab = {token: index for index, token in enumerate([END, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=END, eos_token=END, padding_side="left")


@dataclass(frozen=True)
class Sum:
    """A problem, as text: `"17+5="` and `"22"`."""

    prompt: str
    answer: str


def make_sums(largest: int) -> list[Sum]:
    """All sums of two numbers from 0 to `largest`."""
    numbers = range(largest + 1)
    return [Sum(f"{a}+{b}=", str(a + b)) for a in numbers for b in numbers]


def encode_sums(tokenizer: PreTrainedTokenizerFast, sums: Sequence[Sum]) -> dict[str, Tensor]:
    """Left-padded `input_ids`, `attention_mask`, and `labels` that score the answers only."""
    texts = [problem.prompt + problem.answer + END for problem in sums]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    answer_lengths = torch.tensor([len(problem.answer) + 1 for problem in sums])
    width = batch["input_ids"].shape[1]
    scored = torch.arange(width) >= width - answer_lengths[:, None]
    return {**batch, "labels": batch["input_ids"].masked_fill(~scored, -100)}


def warm_up(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    sums: Sequence[Sum],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[], None],
) -> None:
    """
    Supervised training, so that the reward is neither always 0 nor always 1 when GRPO begins.

    Args:
        model, tokenizer:
            A causal LM and its tokenizer.
        sums (sequence of [`Sum`]):
            Problems to draw from.
        steps, batch_size (`int`):
            Number of updates, and of problems in each.
        learning_rate (`float`):
            Peak of the one-cycle schedule.
        seed (`int`):
            Seed of the draws.
        on_step (`Callable`):
            Called after each update.
    """
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        batch = encode_sums(tokenizer, draw.choices(sums, k=batch_size))
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step()


@torch.no_grad()
def accuracy(model: Any, tokenizer: PreTrainedTokenizerFast, sums: Sequence[Sum], batch_size: int = 512) -> float:
    """Share of sums that greedy decoding gets right."""
    was_training = model.training
    model.eval()
    right = 0
    longest = max(len(problem.answer) for problem in sums) + 1
    for start in range(0, len(sums), batch_size):
        chunk = sums[start : start + batch_size]
        batch = tokenizer(
            [problem.prompt for problem in chunk], padding=True, return_tensors="pt", return_token_type_ids=False
        )
        output = model.generate(**batch, max_new_tokens=longest, do_sample=False)
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(text.replace(" ", "") == problem.answer for text, problem in zip(texts, chunk, strict=True))
    model.train(was_training)
    return right / len(sums)
