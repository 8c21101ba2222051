"""Mixtures as users write them, in the body of a Transformers model, with its experts.

Legend: B batch, T tokens of a sequence, N = B * T, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from model_zoo import build_tiny
from torch import Tensor, nn

E, K = 8, 2


class Mixture(nn.Module):
    """A router that selects by `select(scores (N, E), size)` -> weights, ids; and experts."""

    def __init__(self, select: Callable, experts: nn.Module, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, width) * 0.3)
        self.experts, self.select = experts, select

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        hidden_NH = hidden_BTH.flatten(0, 1)
        scores_NE = F.linear(hidden_NH, self.weight).softmax(-1)
        weights, ids = self.select(scores_NE, hidden_BTH.shape[:2])
        weights = weights / weights.sum(-1, keepdim=True)
        return self.experts(hidden_NH, top_k_weights=weights, top_k_index=ids).view_as(hidden_BTH)


def with_mixtures(select: Callable, layers: tuple[int, ...] = (1, 2)) -> nn.Module:
    """Qwen3-MoE with three layers, of which 1 and 2 have experts, here under a router of one's own."""
    model = build_tiny("qwen3_moe", norm_topk_prob=True)
    torch.manual_seed(0)
    for layer in layers:
        mlp = model.model.layers[layer].mlp
        model.model.layers[layer].mlp = Mixture(select, mlp.experts, model.config.hidden_size)
    return model


def plain(scores: Tensor, size) -> tuple[Tensor, Tensor]:
    return torch.topk(scores, K, dim=-1)


def live_groups(scores: Tensor) -> Tensor:
    """(N, E) of `bool`: the experts of the best two of four groups."""
    groups = scores.unflatten(-1, (4, 2)).amax(-1)
    mask = torch.zeros_like(groups).scatter(1, groups.topk(2, dim=-1)[1], 1.0)
    return mask.repeat_interleave(2, dim=-1).bool()
