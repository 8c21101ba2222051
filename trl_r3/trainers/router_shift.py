"""A weight for tokens whose routers have moved since the rollout (RSPO).

Legend: B batch, T tokens of a padded sequence (P prompt + C completion), L MoE layers, K experts per token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..records.metrics import ReplayStats
from ..records.record import RoutingLayout, missing_rows
from ..records.samples import Sample
from .log import ReplayLog, counted_tokens
from .rollout import Scoring

_FLOOR = 0.8


def shifts(args: Any) -> bool:
    """Whether a config asks for the weight; those of some trainers cannot."""
    return getattr(args, "routing_replay_shift_weight", False)


class RouterShift:
    r"""
    Scales the importance ratio of a token by how far its routers have moved since the old-policy pass.

    With \(r^l(e)\) the score that the router of layer \(l\) gives expert \(e\) in the row that predicts token
    \(t\), before bias and groups, and the K experts of the record, which old policy and update both go through,

    $$\gamma_t = \max(\exp(-\frac{1}{LK} \sum_{l,k} |\log r^l_\theta(e_k) - \log r^l_{old}(e_k)|), 0.8)$$

    without a gradient, and the ratio of the token becomes \(\gamma_t w_t\) before it is clipped (Router-Shift Policy
    Optimization, arXiv 2510.23027, equations 5 to 9 and 11). The paper does not replay: its experts are those that the
    old policy selected. Rows without a record have the weight 1.

    Args:
        layout ([`RoutingLayout`]):
            Layers and experts of the model.
    """

    def __init__(self, layout: RoutingLayout):
        self.layout = layout

    def ask(self, stats: ReplayStats, scoring: Scoring) -> None:
        """Let a pass that replays tell the scores, where it is an old policy's or has one."""
        if scoring.has_old_policy or not scoring.is_update:
            stats.log_scores = []

    def see(self, stats: ReplayStats, scoring: Scoring, prompt_width: int, log: ReplayLog) -> None:
        """
        Keep what an old-policy pass told, or weigh the tokens of an update by it.

        Args:
            stats ([`ReplayStats`]):
                Of the pass.
            scoring ([`Scoring`]):
                What it scored. The old log-probabilities of an update's batch are lowered by the logarithms of the
                weights, which scales its ratios.
            prompt_width (`int`):
                P.
            log ([`ReplayLog`]):
                Where the mean weight goes.
        """
        if stats.log_scores is None:
            return
        log_scores_BTLK = torch.cat(stats.log_scores)
        now = [
            log_scores_TLK[prompt_width - 1 :][: sample.completion_length]  # the row before a token predicts it
            for sample, log_scores_TLK in zip(scoring.samples, log_scores_BTLK, strict=True)
        ]
        if not scoring.is_update:
            for sample, rows in zip(scoring.samples, now, strict=True):
                sample.log_scores = rows.cpu()
            return
        batch = scoring.batch
        assert batch is not None  # of an update
        old_BC = batch["old_per_token_logps"]
        log_weights_BC = torch.zeros_like(old_BC)
        for row_C, sample, rows in zip(log_weights_BC, scoring.samples, now, strict=True):
            row_C[: len(rows)] = self._log_weights(sample, rows)[: len(row_C)].to(row_C)
        batch.setdefault("sampling_per_token_logps", old_BC)  # or TRL's off-policy mask takes the lowered
        batch["old_per_token_logps"] = old_BC - log_weights_BC
        counted_BC = counted_tokens(batch)
        log.add("routing_replay/shift_weight", (log_weights_BC.exp() * counted_BC).sum(), counted_BC.sum())

    def _log_weights(self, sample: Sample, log_scores_CLK: Tensor) -> Tensor:
        """(C,) logarithms of the weights of a sample's completion tokens."""
        if sample.log_scores is None:
            raise RuntimeError(
                f"sample {sample.identity} comes to an update with log-probabilities of an old policy, but the scores "
                "of its routers were not kept. Score it inside `_generate_and_score_completions`, or set "
                "`routing_replay_shift_weight=False`."
            )
        moved_C = (log_scores_CLK - sample.log_scores.to(log_scores_CLK.device)).abs().mean((1, 2))
        first = sample.prompt_length - 1
        missing_C = missing_rows(sample.record[first : first + len(moved_C)], self.layout)
        return -moved_C.masked_fill(missing_C.to(moved_C.device), 0.0).clamp(max=-math.log(_FLOOR))
