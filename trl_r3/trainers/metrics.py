"""How far rollout and training disagree.

Legend: B batch, T tokens, C completion tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..records.agreement import changed_layers


def k3_kl(train_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    """
    The k3 estimate of KL(rollout || train): the mean of `r - 1 - log r` with `r = pi_train / pi_rollout` over the
    sampled tokens. Its expectation under rollout sampling is the divergence (http://joschu.net/blog/kl-approx.html);
    the R3 paper (arXiv 2510.11370) reports it.

    Args:
        train_logprobs (`torch.Tensor` of shape `(B, C)`):
            Log-probabilities of the sampled tokens in nats, scored by the training model.
        rollout_logprobs (`torch.Tensor` of shape `(B, C)`):
            Those that the rollout engine sampled with. NaN where the engine could not score a token; such tokens do
            not count.
        mask (`torch.Tensor` of shape `(B, C)`):
            1 for tokens that count.

    Returns:
        `torch.Tensor` of shape `()`, `torch.float64`; NaN if no token counts.
    """
    k3, _, count = mismatch_sums(train_logprobs, rollout_logprobs, mask)
    return k3 / count


def extreme_token_frac(train_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, tau: float = 2.0) -> Tensor:
    """
    F(tau): the share of sampled tokens with `max(r, 1 / r) > tau`, where `r = pi_train / pi_rollout` (arXiv
    2510.11370).

    Args:
        train_logprobs, rollout_logprobs, mask (`torch.Tensor` of shape `(B, C)`):
            As in [`k3_kl`].
        tau (`float`, *optional*, defaults to `2.0`):
            Ratio from which on a token is extreme, above 1.

    Returns:
        `torch.Tensor` of shape `()`, `torch.float64`; NaN if no token counts.
    """
    _, extreme, count = mismatch_sums(train_logprobs, rollout_logprobs, mask, tau)
    return extreme / count


def mismatch_sums(
    train_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, tau: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """
    What [`k3_kl`] and [`extreme_token_frac`] are means of, without waiting for a device.

    Args:
        train_logprobs, rollout_logprobs, mask (`torch.Tensor` of shape `(B, C)`), tau (`float`):
            As in [`extreme_token_frac`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]` of shape `()`, `torch.float64`: The sum of the k3 estimates,
        the number of extreme tokens, and the number of tokens that count.
    """
    counted = mask.bool() & ~rollout_logprobs.isnan()
    log_ratio = torch.where(counted, train_logprobs.double() - rollout_logprobs.double(), 0.0)
    k3 = torch.expm1(log_ratio) - log_ratio
    return k3.sum(), (log_ratio.abs() > math.log(tau)).double().sum(), counted.double().sum()


def changed_router_frac(live: Tensor, recorded: Tensor) -> Tensor:
    """
    Share of (token, layer) pairs whose live selection differs from the recorded one.

    Args:
        live (`torch.Tensor` of shape `(B, T, L, K)`):
            Ids that the training model selects.
        recorded (`torch.Tensor` of shape `(B, T, L, K)`):
            Ids of the rollout; rows of -1 do not count.

    Returns:
        `torch.Tensor` of shape `()`; NaN if no row counts.
    """
    return changed_layers(live, recorded)[recorded[..., 0, 0] != -1].double().mean()


def changed_token_frac(live: Tensor, recorded: Tensor) -> Tensor:
    """
    Share of tokens with at least one layer whose live selection differs from the recorded one.

    Args:
        live, recorded (`torch.Tensor` of shape `(B, T, L, K)`):
            As in [`changed_router_frac`].

    Returns:
        `torch.Tensor` of shape `()`; NaN if no row counts.
    """
    return changed_layers(live, recorded)[recorded[..., 0, 0] != -1].any(-1).double().mean()
