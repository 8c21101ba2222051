"""What `masked_topk_gating` takes and returns, for every implementation of it.

Shape legend: T tokens, E experts, K experts per token.
"""

from enum import IntEnum
from typing import NamedTuple

import torch

from ..records.record import MISSING_UINT8

SCORES = ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("top2_sum", "max")
LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ID_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


class RowStatus(IntEnum):
    """
    Values of [`GatingOutput`]'s `status`: what became of a row.

    `(output.status == RowStatus.INVALID).sum()` counts rows on the device, without a synchronisation.

    Args:
        AS_RECORDED (`0`):
            Went through its recorded experts, and the live selection is the same set. Where no record is given, or
            where the live selection is not compared, nothing is said of the live selection.
        DIFFERS_LIVE (`1`):
            Went through its recorded experts, and the live selection is another set.
        MISSING (`2`):
            Holds the missing mark and went live.
        INVALID (`3`):
            Neither missing nor K distinct ids in [0, E). It went live as well: an id that no expert has is never used
            to read anything, and the caller decides whether the row is an error.
    """

    AS_RECORDED = 0
    DIFFERS_LIVE = 1
    MISSING = 2
    INVALID = 3


class GatingOutput(NamedTuple):
    """
    Result of [`masked_topk_gating`].

    Args:
        weights (`torch.Tensor`):
            (T, K), one weight per slot, differentiable with respect to the logits.
        expert_ids (`torch.Tensor`):
            (T, K) int64. A recorded row keeps the order of its slots; a live row is sorted by descending selection
            score, lowest id first on ties.
        status (`torch.Tensor`):
            (T,) uint8 on the logits' device, one [`RowStatus`] per row; all zero where no record is given.
    """

    weights: torch.Tensor
    expert_ids: torch.Tensor
    status: torch.Tensor


def check_gating_arguments(
    router_logits: torch.Tensor,
    top_k: int,
    recorded: torch.Tensor | None,
    score: str,
    bias: torch.Tensor | None,
    n_group: int,
    topk_group: int,
    group_score: str,
    eps: float,
    weights_dtype: torch.dtype | None,
) -> None:
    """
    Raise where the arguments are no gating problem. Only metadata is looked at, so that nothing waits for a device.

    Raises:
        ValueError: a shape, size, device or name that does not fit.
        TypeError: a dtype that is not supported.
    """
    if router_logits.dim() != 2:
        raise ValueError(
            f"router_logits must be (T, E), got {router_logits.dim()} dimensions: {tuple(router_logits.shape)}. "
            "Flatten batch and sequence first: logits.reshape(-1, num_experts)."
        )
    num_tokens, num_experts = router_logits.shape
    if router_logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"router_logits is {router_logits.dtype}, expected one of {LOGIT_DTYPES}. Cast it first.")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, but there are {num_experts} experts. Choose 1 <= top_k <= {num_experts}.")
    if score not in SCORES:
        raise ValueError(f"score is {score!r}, expected one of {SCORES}.")
    if not eps >= 0.0:
        raise ValueError(f"eps is {eps}, expected a number >= 0: it keeps a denominator away from zero.")
    if weights_dtype is not None and weights_dtype not in LOGIT_DTYPES:
        raise TypeError(f"weights_dtype is {weights_dtype}, expected None or one of {LOGIT_DTYPES}.")
    if bias is not None and (bias.shape != (num_experts,) or bias.device != router_logits.device):
        raise ValueError(
            f"bias is {tuple(bias.shape)} on {bias.device}, expected ({num_experts},) on {router_logits.device}: "
            "one number per expert, beside the logits."
        )
    if bias is not None and bias.dtype not in LOGIT_DTYPES:
        raise TypeError(f"bias is {bias.dtype}, expected one of {LOGIT_DTYPES}. Cast it first.")
    check_groups(num_experts, top_k, n_group, topk_group, group_score)
    if recorded is not None:
        check_record(recorded, num_tokens, num_experts, top_k, router_logits.device)


def check_groups(num_experts: int, top_k: int, n_group: int, topk_group: int, group_score: str) -> None:
    """Raise `ValueError` where the group arguments leave fewer than `top_k` experts or uneven groups."""
    if group_score not in GROUP_SCORES:
        raise ValueError(f"group_score is {group_score!r}, expected one of {GROUP_SCORES}.")
    if n_group < 1 or num_experts % n_group:
        raise ValueError(f"{num_experts} experts cannot be split into n_group={n_group} equal groups.")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group is {topk_group}, but n_group is {n_group}. Choose 1 <= topk_group <= {n_group}.")
    group_size = num_experts // n_group
    if topk_group * group_size < top_k:
        raise ValueError(
            f"topk_group={topk_group} groups of {group_size} experts hold {topk_group * group_size}, fewer than "
            f"top_k={top_k}. Raise topk_group or lower top_k."
        )
    if n_group > 1 and group_score == "top2_sum" and group_size < 2:
        raise ValueError(f"group_score='top2_sum' needs 2 experts a group, got {group_size}. Use group_score='max'.")


def check_record(recorded: torch.Tensor, num_tokens: int, num_experts: int, top_k: int, device: torch.device) -> None:
    """Raise `ValueError` or `TypeError` where `recorded` cannot be the record of these tokens."""
    if recorded.shape != (num_tokens, top_k):
        raise ValueError(
            f"recorded is {tuple(recorded.shape)}, expected ({num_tokens}, {top_k}): one row per token and one id per "
            "slot. Mark rows without a record with -1 (255 in uint8) instead of leaving them out."
        )
    if recorded.dtype not in ID_DTYPES:
        raise TypeError(f"recorded is {recorded.dtype}, expected one of {ID_DTYPES}. Cast it first.")
    if recorded.dtype == torch.uint8 and num_experts > MISSING_UINT8:
        raise TypeError(
            f"recorded is uint8, where {MISSING_UINT8} means missing, but there are {num_experts} experts. "
            f"uint8 holds the ids of at most {MISSING_UINT8} experts: use int16."
        )
    if recorded.device != device:
        raise ValueError(f"recorded is on {recorded.device}, router_logits on {device}. Move one of them.")
