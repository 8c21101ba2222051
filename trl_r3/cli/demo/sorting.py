"""A mixture of experts of eight experts a layer, a tokenizer of single letters, and rows of letters to sort."""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig

END = "<end>"
LETTERS = "abcdefghijkl"
SORT = ">"
_FIRST = 1  # id of the first letter
_SORT = _FIRST + len(LETTERS)


def sorting_config(top_k: int = 2) -> Qwen3MoeConfig:
    """
    Three layers of eight experts: 0.25 million parameters.

    Args:
        top_k (`int`, *optional*, defaults to `2`):
            Experts a token. The weight of a single one is its probability; those of several are normalised.
    """
    return Qwen3MoeConfig(
        vocab_size=_SORT + 1,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=top_k,
        norm_topk_prob=top_k > 1,
        max_position_embeddings=64,
        initializer_range=48**-0.5,  # keeps the scale of what the weights act on
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
        router_aux_loss_coef=0.0,
    )


def sorting_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter."""
    vocab = {token: index for index, token in enumerate([END, *LETTERS, SORT])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=END, eos_token=END, padding_side="left")


def make_rows(count: int, length: int, seed: int) -> list[dict[str, Any]]:
    """Prompts as text, `"badc>"`, and the ids of their answers: `length` letters each, drawn with repetition."""
    draw = random.Random(seed)
    rows = [draw.choices(LETTERS, k=length) for _ in range(count)]
    return [
        {"prompt": "".join(row) + SORT, "answer": [_FIRST + LETTERS.index(each) for each in sorted(row)]}
        for row in rows
    ]


def all_right(completion_ids: list[list[int]], answer: list[list[int]], **kwargs: Any) -> list[float]:
    """1 for a sorted row, 0 where a single letter is wrong."""
    return [float(ids == right) for ids, right in zip(completion_ids, answer, strict=True)]


def draw_batch(count: int, length: int, generator: torch.Generator) -> Tensor:
    """Prompts and answers as ids, of shape (count, 2 * length + 1)."""
    rows = torch.randint(_FIRST, _SORT, (count, length), generator=generator)
    return torch.cat([rows, torch.full((count, 1), _SORT), rows.sort(-1).values], dim=1)


@torch.no_grad()
def share_sorted(model: Any, rows: Tensor) -> float:
    """Share of rows, as [`draw_batch`] gives them, that greedy decoding gets right."""
    length = rows.shape[1] // 2
    was_training = model.training
    model.eval()
    prompts = rows[:, : length + 1]
    output = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=length, min_new_tokens=length, do_sample=False
    )
    model.train(was_training)
    return float((output == rows).all(-1).float().mean())
