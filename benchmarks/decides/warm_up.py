"""Supervised training before GRPO, so that the reward is neither always 0 nor always 1 when it begins."""

from __future__ import annotations

from typing import Any

import torch

from trl_r3.cli.demo.sorting import draw_batch, share_sorted


def warm_up_sorting(model: Any, length: int, target: float, seed: int, max_steps: int = 600) -> float:
    """
    Supervised training until so many rows are sorted right.

    Args:
        model:
            A causal LM.
        length (`int`):
            Letters a row.
        target (`float`):
            Share of rows that greedy decoding is to get right.
        seed (`int`):
            Of the draws.
        max_steps (`int`, *optional*, defaults to `600`):
            Updates after which it is given up.

    Returns:
        `float`: The share that was reached.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = draw_batch(500, length, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(max_steps):
        model.train()
        ids = draw_batch(256, length, generator)
        labels = ids.clone()
        labels[:, : length + 1] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4 and (reached := share_sorted(model, held_out)) >= target:
            return reached
    raise RuntimeError(f"{max_steps} steps of warm-up did not bring the share of sorted rows to {target}. Allow more.")
