"""How far two selections, and the probabilities that follow from them, disagree: pure tensors.

Legend: B batch, T tokens, N tokens of a forward (B * T), C completion tokens, D draws, V vocabulary, M rows, L MoE
layers, E experts, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

AGES = (0, 1, 2, 4, 8)  # updates since a rollout, each up to the next


def agreement_at(age: int) -> str:
    """Name under which the agreement of records from an age on is logged."""
    return f"routing_replay/load/agreement_at_{age}"


# Names under which shares are logged.
SHARES = (
    "routing_replay/replayed_frac",
    "routing_replay/missing_frac",
    "routing_replay/changed_router_frac",
    "routing_replay/changed_token_frac",
    "routing_replay/agreement",
    "routing_replay/contrast",
    "routing_replay/shift_weight",
    "sampling/k3_kl",
    "sampling/extreme_token_frac",
    "sampling/live/k3_kl",
    "sampling/live/extreme_token_frac",
    *map(agreement_at, AGES),
)
# Those of asynchronous training alone.
ASYNC_SHARES = (
    "routing_replay/fresh/changed_router_frac",
    "routing_replay/fresh/changed_token_frac",
    "routing_replay/staleness",
    "routing_replay/spanning_frac",
    "routing_replay/shared_conflict_frac",
)


def shared_experts(one: Tensor, other: Tensor) -> Tensor:
    """
    Number of experts that two selections share.

    Args:
        one, other (`torch.Tensor` of shape `(..., K)`):
            Distinct expert ids of any integer dtype.

    Returns:
        `torch.Tensor` of shape `(...)` and dtype `torch.int64`.
    """
    return (one.unsqueeze(-1) == other.unsqueeze(-2)).sum((-1, -2))


def changed_layers(live: Tensor, recorded: Tensor) -> Tensor:
    """
    Where two selections are different sets.

    Args:
        live, recorded (`torch.Tensor` of shape `(..., L, K)`):
            Distinct expert ids.

    Returns:
        `torch.BoolTensor` of shape `(..., L)`.
    """
    return shared_experts(live, recorded) != live.shape[-1]


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


def drawn_logprobs(logits_DV: Tensor, tokens_D: Tensor) -> Tensor:
    """
    Log-probabilities of the tokens that were drawn, over the vocabulary.

    Args:
        logits_DV (`torch.Tensor` of shape `(D, V)`):
            Logits divided by the temperature; -inf where a token could not be drawn.
        tokens_D (`torch.Tensor` of shape `(D,)`):
            Ids of the tokens.

    Returns:
        `torch.Tensor` of shape `(D,)`, in nats.
    """
    return logits_DV.gather(1, tokens_D[:, None].long())[:, 0] - logits_DV.logsumexp(1)


def expert_load(ids_MLK: Tensor, num_experts: int) -> Tensor:
    """
    How often each expert of each layer is selected.

    Args:
        ids_MLK (`torch.Tensor` of shape `(M, L, K)`):
            Ids of any integer dtype, none missing, on the host.
        num_experts (`int`):
            Number of experts E.

    Returns:
        `torch.Tensor` of shape `(L, E)`, `torch.int64`.
    """
    ids = ids_MLK.numpy()  # its count is several times faster than PyTorch's
    counts = [np.bincount(ids[:, layer].ravel(), minlength=num_experts) for layer in range(ids.shape[1])]
    return torch.from_numpy(np.stack(counts))


@dataclass
class ReplayStats:
    """What [`RouterReplay.replay`] yields: counts over its forwards, on the model's device until they are read."""

    forwards: int = 0
    recorded_tokens: Tensor | int = 0  # tokens with a record
    compared_tokens: Tensor | int = 0  # those that are attended to
    changed_routers: Tensor | int = 0  # (token, layer) pairs whose live set differs from the recorded one
    changed_by_layer: Tensor | int = 0  # (L,) such pairs of each layer
    changed_tokens: Tensor | int = 0  # tokens with at least one such layer
    changed: Tensor | None = None  # (N, L) of the last forward: whether they differ
    log_scores: list[Tensor] | None = None  # (B_i, T, L, K) of recorded experts by forward, where a list asks for them

    def add(self, changed_NL: Tensor, recorded_N: Tensor, attended_N: Tensor | None) -> None:
        """Count one forward."""
        compared_N = recorded_N if attended_N is None else recorded_N & attended_N.to(recorded_N.device)
        self.changed = changed_NL = changed_NL & compared_N[:, None]
        self.forwards += 1
        self.recorded_tokens = self.recorded_tokens + recorded_N.sum()
        self.compared_tokens = self.compared_tokens + compared_N.sum()
        self.changed_by_layer = self.changed_by_layer + (changed_L := changed_NL.sum(0))
        self.changed_routers = self.changed_routers + changed_L.sum()
        self.changed_tokens = self.changed_tokens + changed_NL.any(1).sum()
