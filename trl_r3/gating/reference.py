"""Masked top-k gating in plain PyTorch: the definition that every faster implementation is compared with.

Shape legend: T tokens, E experts, K experts per token, G groups of M = E / G experts, S selected groups.
"""

import torch
import torch.nn.functional as F

from ..records.checks import sound_rows
from ..records.metrics import changed_layers
from ..records.record import MISSING, MISSING_UINT8
from .contract import GatingOutput, RowStatus, check_gating_arguments

# Below this logit sqrt(softplus(x)) is exp(x / 2) in double precision, and the direct form soon has no gradient left.
SQRTSOFTPLUS_TAIL = -40.0


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 logits, float32 for every other dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sqrt_softplus(logits: torch.Tensor) -> torch.Tensor:
    """sqrt(log(1 + exp(x))), with a gradient also where exp(x) underflows."""
    body = F.softplus(logits.clamp(min=SQRTSOFTPLUS_TAIL)).sqrt()
    return torch.where(logits < SQRTSOFTPLUS_TAIL, torch.exp(0.5 * logits), body)


def expert_scores(logits_TE: torch.Tensor, score: str) -> torch.Tensor:
    """(T, E) scores that bias and groups work on. For `"topk_softmax"` those are the logits."""
    if score == "softmax":
        return torch.softmax(logits_TE, dim=-1)
    if score == "sigmoid":
        return torch.sigmoid(logits_TE)
    if score == "sqrtsoftplus":
        return sqrt_softplus(logits_TE)
    return logits_TE


def largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the `k` largest along the last dimension, descending, lowest index first on ties."""
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices
    return order[..., :k].contiguous()  # a view would keep the whole order in memory


def select_live(
    logits_TE: torch.Tensor,
    top_k: int,
    score: str,
    bias: torch.Tensor | None,
    n_group: int,
    topk_group: int,
    group_score: str,
) -> torch.Tensor:
    """
    (T, K) int64 ids of the live selection.

    Every score function rises strictly with the logit, so without bias and groups the logits themselves are compared:
    scores that saturate or round to one value would make ties of logits that differ.
    """
    if bias is None and n_group == 1:
        return largest(logits_TE, top_k)
    key_TE = expert_scores(logits_TE, score)
    if bias is not None:
        key_TE = key_TE + bias.to(key_TE.dtype)
    if n_group == 1:
        return largest(key_TE, top_k)
    key_TGM = key_TE.unflatten(-1, (n_group, -1))
    group_key_TG = key_TGM.amax(-1) if group_score == "max" else key_TGM.topk(2, dim=-1).values.sum(-1)
    group_TS = largest(group_key_TG, topk_group).sort(dim=-1).values  # ascending, so that ties go to the lowest id
    size = key_TGM.shape[-1]
    member_TSM = group_TS.unsqueeze(-1) * size + torch.arange(size, device=key_TE.device)
    member_T = member_TSM.flatten(1)  # (T, S * M) ids, ascending
    return member_T.gather(1, largest(key_TE.gather(1, member_T), top_k))


def classify_record(
    recorded_TK: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Which rows are recorded and which missing.

    Returns:
        `tuple`: the ids as int64 (T, K), and three (T,) bool masks, exactly one of which is true in every row:
        recorded (K distinct ids in [0, E)), missing (any slot holds the missing mark), invalid (the rest).
    """
    missing_mark = MISSING_UINT8 if recorded_TK.dtype == torch.uint8 else MISSING
    missing_T = (recorded_TK == missing_mark).any(-1)
    ids_TK = recorded_TK.long()
    recorded_T = sound_rows(ids_TK, num_experts) & ~missing_T
    return ids_TK, recorded_T, missing_T, ~(recorded_T | missing_T)


def choose_experts(
    live_TK: torch.Tensor, recorded_TK: torch.Tensor | None, num_experts: int, compare_live: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, K) executed ids (recorded ones where a row has a sound record, live ones elsewhere), (T,) [`RowStatus`]."""
    if recorded_TK is None:
        return live_TK, live_TK.new_zeros(live_TK.shape[0], dtype=torch.uint8)
    ids_TK, recorded_T, missing_T, invalid_T = classify_record(recorded_TK, num_experts)
    expert_ids_TK = torch.where(recorded_T.unsqueeze(-1), ids_TK, live_TK)
    status_T = missing_T * RowStatus.MISSING + invalid_T * RowStatus.INVALID
    if compare_live:
        status_T = status_T + changed_layers(live_TK, expert_ids_TK) * RowStatus.DIFFERS_LIVE
    return expert_ids_TK, status_T.to(torch.uint8)


def gate_weights(
    logits_TE: torch.Tensor, ids_TK: torch.Tensor, score: str, renormalize: bool, eps: float, scale: float
) -> torch.Tensor:
    """
    (T, K) weights of the experts `ids_TK`, differentiable with respect to the logits.

    softmax over E, gathered and divided by its sum, is softmax over the K gathered logits. The second form is the one
    used where `eps` is 0: the first is 0 / 0 where the chosen logits lie some 88 below the row's maximum.
    """
    if score == "topk_softmax" or (score == "softmax" and renormalize and eps == 0.0):
        score_TK = torch.softmax(logits_TE.gather(1, ids_TK), dim=-1)
    elif score == "softmax":
        score_TK = expert_scores(logits_TE, score).gather(1, ids_TK)
    else:
        score_TK = expert_scores(logits_TE.gather(1, ids_TK), score)
    if renormalize:
        score_TK = score_TK / (score_TK.sum(dim=-1, keepdim=True) + eps)
    return score_TK * scale


def masked_topk_gating_ref(
    router_logits: torch.Tensor,
    top_k: int,
    recorded: torch.Tensor | None = None,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    bias: torch.Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2_sum",
    eps: float = 0.0,
    scale: float = 1.0,
    weights_dtype: torch.dtype | None = None,
    compare_live: bool = True,
) -> GatingOutput:
    """
    [`masked_topk_gating`] in plain PyTorch, differentiated by autograd. Arguments, result, errors and sources are
    those of [`masked_topk_gating`].
    """
    check_gating_arguments(
        router_logits, top_k, recorded, score, bias, n_group, topk_group, group_score, eps, weights_dtype
    )
    logits_TE = router_logits.to(compute_dtype(router_logits.dtype))
    with torch.no_grad():
        live_TK = select_live(logits_TE, top_k, score, bias, n_group, topk_group, group_score)
        expert_ids_TK, status_T = choose_experts(live_TK, recorded, router_logits.shape[1], compare_live)
    weights_TK = gate_weights(logits_TE, expert_ids_TK, score, renormalize, eps, scale)
    return GatingOutput(weights_TK.to(weights_dtype or router_logits.dtype), expert_ids_TK, status_T)
