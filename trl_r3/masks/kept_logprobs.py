"""
Log-probabilities and entropies over kept tokens, from hidden states and the kept rows of the head only.

A tile of predictions is scored against the union of the ids that its rows keep; the backward computes the tile again.

Legend: N predictions, R of them scored, H hidden size, V vocabulary, n rows of a tile, U ids that any of them keeps,
m ids of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from .masked_batch import KeptRows

_TILE_ELEMENTS = 2**23  # n x U at most: 32 MB in float32
_TILE_ROWS = 512  # rows of few ids: more of them widen the union


@dataclass(frozen=True)
class Head:
    """
    What becomes of a projection: `softcap(y * scale) / temperature`.

    Args:
        temperature (`float`):
            What the trainer divides logits by.
        softcap (`float`, *optional*):
            Bound of the logits before that.
        scale (`float`):
            What the model multiplies the projection by.
        dtype (`torch.dtype`):
            What the projection is computed in.
    """

    temperature: float
    softcap: float | None
    scale: float
    dtype: torch.dtype

    def logits(self, y_nU: Tensor) -> Tensor:
        """In float32."""
        z_nU = y_nU.float() * self.scale
        if self.softcap is not None:
            z_nU = self.softcap * torch.tanh(z_nU / self.softcap)
        return z_nU / self.temperature


@dataclass
class Tile:
    """Some rows, and the union of the ids that they keep; `None` where that is the whole vocabulary."""

    rows: Tensor  # (n,) of the N predictions
    union: Tensor | None  # (U,) ids, ascending
    kept_nU: Tensor | None  # bool
    drawn: Tensor  # (n,) index of the sampled token among the U

    def weight(self, weight_VH: Tensor) -> Tensor:
        return weight_VH if self.union is None else weight_VH[self.union]

    def project(self, hidden_nH: Tensor, weight_UH: Tensor, bias_V: Tensor | None) -> Tensor:
        y_nU = hidden_nH @ weight_UH.t()
        return y_nU if bias_V is None else y_nU + self.weight(bias_V).to(y_nU.dtype)

    def score(self, z_nU: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the sampled tokens, and entropies, `(n,)` each."""
        if self.kept_nU is not None:
            z_nU = z_nU.masked_fill(~self.kept_nU, -torch.inf)
        log_p_nU = z_nU.log_softmax(1)
        chosen = log_p_nU.gather(1, self.drawn[:, None])[:, 0]
        if not entropy:
            return chosen, None
        finite_nU = log_p_nU if self.kept_nU is None else log_p_nU.masked_fill(~self.kept_nU, 0.0)
        return chosen, -(log_p_nU.exp() * finite_nU).sum(1)


def tiles(kept: KeptRows, targets_N: Tensor, vocabulary: int) -> Iterator[Tile]:
    """Cut the rows into tiles that stay small."""
    device = targets_N.device
    ends = torch.where(kept.counts == 0, vocabulary, kept.counts).cumsum(0)
    restricted = int((kept.counts > 0).sum())
    ids, rows, counts = (each.to(device) for each in (kept.ids.long(), kept.rows, kept.counts))
    first = taken = 0
    while first < len(rows):
        limit = restricted if first < restricted else len(rows)
        last = _end_of_tile(ends, first, min(limit, first + _TILE_ROWS), vocabulary)
        chosen = rows[first:last]
        drawn = targets_N[chosen]
        if first >= restricted:
            yield Tile(chosen, None, None, drawn)
        else:
            m = int(ends[last - 1]) - taken
            yield _restricted(chosen, counts[first:last], ids[taken : taken + m], drawn, vocabulary)
            taken += m
        first = last


def _end_of_tile(ends: Tensor, first: int, limit: int, vocabulary: int) -> int:
    before = int(ends[first - 1]) if first else 0
    widths = (ends[first:limit] - before).clamp(max=vocabulary)
    fits = torch.arange(1, len(widths) + 1, device="cpu") * widths <= _TILE_ELEMENTS
    return first + max(int(fits.sum()), 1)


def _restricted(rows: Tensor, counts: Tensor, ids_m: Tensor, drawn: Tensor, vocabulary: int) -> Tile:
    present_V = torch.zeros(vocabulary, dtype=torch.bool, device=ids_m.device)
    present_V[ids_m] = True
    union = present_V.nonzero()[:, 0]
    slot_V = present_V.cumsum(0) - 1
    kept_nU = torch.zeros(len(rows), len(union), dtype=torch.bool, device=ids_m.device)
    of_row = torch.repeat_interleave(torch.arange(len(rows), device=ids_m.device), counts, output_size=len(ids_m))
    kept_nU[of_row, slot_V[ids_m]] = True
    return Tile(rows, union, kept_nU, slot_V[drawn])


class KeptLogProbs(torch.autograd.Function):
    """
    Of `(N, H)` hidden states, `(V, H)` rows of the head and `(N,)` targets: log-probabilities and entropies `(N,)` in
    float32, 0 where a prediction is not scored. Gradients are summed in float32; those of rows that nothing keeps are
    exactly 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        kept: KeptRows,
        head: Head,
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        logprobs_N = torch.zeros(len(targets_N), dtype=torch.float32, device=hidden_NH.device)
        entropies_N = torch.zeros_like(logprobs_N) if entropy else None
        with _no_autocast(hidden_NH):
            for tile in tiles(kept, targets_N, len(weight_VH)):
                weight_UH = tile.weight(weight_VH).to(head.dtype)
                y_nU = tile.project(hidden_NH[tile.rows].to(head.dtype), weight_UH, bias_V)
                chosen, spread = tile.score(head.logits(y_nU), entropy)
                logprobs_N[tile.rows] = chosen
                if entropies_N is not None and spread is not None:
                    entropies_N[tile.rows] = spread
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N)
        ctx.kept, ctx.head = kept, head
        return logprobs_N, entropies_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:  # type: ignore[override]
        hidden_NH, weight_VH, bias_V, targets_N = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        with maybe_gather_lm_head_ctx(weight_VH, bias_V), _no_autocast(hidden_NH):
            sums = [
                torch.zeros(each.shape, dtype=torch.float32, device=each.device) if needs else None
                for each, needs in zip((hidden_NH, weight_VH, bias_V), needed, strict=True)
            ]
            if any(grad is not None for grad in grads):
                for tile in tiles(ctx.kept, targets_N, len(weight_VH)):
                    _add_gradients(sums, tile, hidden_NH, weight_VH, bias_V, ctx.head, grads)
        inputs = (hidden_NH, weight_VH, bias_V)
        results = [None if s is None else s.to(each.dtype) for s, each in zip(sums, inputs, strict=True)]
        return (*results, None, None, None, None)


def _add_gradients(
    sums: list[Tensor | None],
    tile: Tile,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    head: Head,
    grads: tuple[Tensor | None, ...],
) -> None:
    hidden_nH, weight_UH = hidden_NH[tile.rows].to(head.dtype), tile.weight(weight_VH).to(head.dtype)
    y_nU = tile.project(hidden_nH, weight_UH, bias_V).requires_grad_()
    with torch.enable_grad():
        scores = tile.score(head.logits(y_nU), grads[1] is not None)
    pairs = [(s, g[tile.rows]) for s, g in zip(scores, grads, strict=True) if s is not None and g is not None]
    (grad_nU,) = torch.autograd.grad([s for s, _ in pairs], [y_nU], [g for _, g in pairs])
    of_hidden, of_weight, of_bias = sums
    grad_nU, rows = grad_nU.float(), slice(None) if tile.union is None else tile.union
    if of_hidden is not None:
        of_hidden[tile.rows] = grad_nU @ weight_UH.float()
    if of_weight is not None:
        of_weight[rows] += grad_nU.t() @ hidden_nH.float()
    if of_bias is not None:
        of_bias[rows] += grad_nU.sum(0)


def _no_autocast(like: Tensor) -> AbstractContextManager:
    # dtypes are chosen here, by the rule of TRL's head
    return torch.autocast(like.device.type, enabled=False)
