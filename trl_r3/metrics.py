"""How far rollout and training disagree.

Legend: B batch, T tokens, C completion tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    log_ratio = _log_ratio(train_logprobs, rollout_logprobs, mask)
    return (torch.expm1(log_ratio) - log_ratio).mean()


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
    log_ratio = _log_ratio(train_logprobs, rollout_logprobs, mask)
    return (log_ratio.abs() > torch.tensor(tau, dtype=torch.float64).log()).double().mean()


def _log_ratio(train_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    counted = mask.bool() & ~rollout_logprobs.isnan()
    return train_logprobs[counted].double() - rollout_logprobs[counted].double()


def changed_layers(live: Tensor, recorded: Tensor) -> Tensor:
    """
    Where two selections differ as sets; the order of the ids says nothing.

    Args:
        live, recorded (`torch.Tensor` of shape `(..., L, K)`):
            Expert ids.

    Returns:
        `torch.BoolTensor` of shape `(..., L)`.
    """
    return (live.sort(-1).values != recorded.sort(-1).values).any(-1)


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
