"""The two raw ops, their PyTorch kernels and their fakes.

Compiled kernels, where they were built, add themselves to the raw ops under the keys CPU and CUDA.
Shape legend: T tokens, E experts, K experts per token.
"""

import torch

from .contract import GROUP_SCORES, SCORES
from .reference import (
    SQRTSOFTPLUS_TAIL,
    choose_experts,
    compute_dtype,
    expert_scores,
    gate_weights,
    select_live,
    sqrt_softplus,
)

torch.library.define(
    "trl_r3::gating_forward",
    "(Tensor logits, int top_k, Tensor? recorded, Tensor? bias, int score, bool renormalize, int n_group, "
    "int topk_group, bool group_max, float eps, float scale, ScalarType weights_dtype, bool compare_live) "
    "-> (Tensor weights, Tensor expert_ids, Tensor status)",
)
torch.library.define(
    "trl_r3::gating_backward",
    "(Tensor grad_weights, Tensor logits, Tensor expert_ids, int score, bool renormalize, float eps, float scale) "
    "-> Tensor",
)


def gating_forward_torch(
    logits: torch.Tensor,  # (T, E)
    top_k: int,
    recorded: torch.Tensor | None,  # (T, K)
    bias: torch.Tensor | None,  # (E,)
    score: int,
    renormalize: bool,
    n_group: int,
    topk_group: int,
    group_max: bool,
    eps: float,
    scale: float,
    weights_dtype: torch.dtype,
    compare_live: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PyTorch kernel of the forward: (T, K) weights, (T, K) ids, (T,) status."""
    logits_TE = logits.to(compute_dtype(logits.dtype))
    live_TK = select_live(
        logits_TE, top_k, SCORES[score], bias, n_group, topk_group, GROUP_SCORES[1 if group_max else 0]
    )
    expert_ids_TK, status_T = choose_experts(live_TK, recorded, logits.shape[1], compare_live)
    weights_TK = gate_weights(logits_TE, expert_ids_TK, SCORES[score], renormalize, eps, scale)
    return weights_TK.to(weights_dtype), expert_ids_TK, status_T


def gating_backward_torch(
    grad_weights: torch.Tensor,  # (T, K)
    logits: torch.Tensor,  # (T, E)
    expert_ids: torch.Tensor,  # (T, K)
    score: int,
    renormalize: bool,
    eps: float,
    scale: float,
) -> torch.Tensor:
    """
    PyTorch kernel of the backward: (T, E) gradient of the logits.

    With s the scores of the K experts, u = s / (sum(s) + eps), g the scaled incoming gradient and G = sum(g * u), a
    score receives h = (g - G) / (sum(s) + eps), or h = g where nothing is renormalised, and passes it on through its
    derivative. Softmax over all E experts adds -p_i * sum(h * s), which for renormalised weights is
    -p_i * G * eps / (sum(s) + eps).
    """
    name = SCORES[score]
    x_TE = logits.to(compute_dtype(logits.dtype))
    g_TK = grad_weights.to(x_TE.dtype) * scale
    if name == "topk_softmax" or (name == "softmax" and renormalize and eps == 0.0):
        u_TK = torch.softmax(x_TE.gather(1, expert_ids), dim=-1)
        if name == "topk_softmax" and renormalize:
            g_TK = g_TK / (1.0 + eps)
        slot_TK = u_TK * (g_TK - (g_TK * u_TK).sum(-1, keepdim=True))
        return torch.zeros_like(x_TE).scatter_(1, expert_ids, slot_TK).to(logits.dtype)
    if name == "softmax":
        p_TE = torch.softmax(x_TE, dim=-1)
        s_TK = p_TE.gather(1, expert_ids)
        if renormalize:
            total_T1 = s_TK.sum(-1, keepdim=True) + eps
            u_TK = s_TK / total_T1
            mean_T1 = (g_TK * u_TK).sum(-1, keepdim=True)
            slot_TK, all_T1 = u_TK * (g_TK - mean_T1), mean_T1 * eps / total_T1
        else:
            slot_TK = s_TK * g_TK
            all_T1 = slot_TK.sum(-1, keepdim=True)
        return (-p_TE * all_T1).scatter_add_(1, expert_ids, slot_TK).to(logits.dtype)
    x_TK = x_TE.gather(1, expert_ids)
    s_TK = expert_scores(x_TK, name)
    if name == "sigmoid":
        slope_TK = s_TK * torch.sigmoid(-x_TK)
    else:
        body_TK = 0.5 * torch.sigmoid(x_TK) / sqrt_softplus(x_TK.clamp(min=SQRTSOFTPLUS_TAIL))
        slope_TK = torch.where(x_TK < SQRTSOFTPLUS_TAIL, 0.5 * s_TK, body_TK)
    if renormalize:
        total_T1 = s_TK.sum(-1, keepdim=True) + eps
        g_TK = (g_TK - (g_TK * s_TK / total_T1).sum(-1, keepdim=True)) / total_T1
    return torch.zeros_like(x_TE).scatter_(1, expert_ids, g_TK * slope_TK).to(logits.dtype)


torch.library.impl("trl_r3::gating_forward", "CompositeExplicitAutograd", gating_forward_torch)
torch.library.impl("trl_r3::gating_backward", "CompositeExplicitAutograd", gating_backward_torch)


@torch.library.register_fake("trl_r3::gating_forward")
def _gating_forward_fake(
    logits,
    top_k,
    recorded,
    bias,
    score,
    renormalize,
    n_group,
    topk_group,
    group_max,
    eps,
    scale,
    weights_dtype,
    compare,
):
    num_tokens = logits.shape[0]
    return (
        logits.new_empty((num_tokens, top_k), dtype=weights_dtype),
        logits.new_empty((num_tokens, top_k), dtype=torch.int64),
        logits.new_empty((num_tokens,), dtype=torch.uint8),
    )


@torch.library.register_fake("trl_r3::gating_backward")
def _gating_backward_fake(grad_weights, logits, expert_ids, score, renormalize, eps, scale):
    return torch.empty_like(logits)
