"""`masked_topk_gating`: the public function and its autograd.

Shape legend: T tokens, E experts, K experts per token.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .contract import SCORES, GatingOutput, check_gating_arguments
from .ops import gating_backward_torch, gating_forward_torch
from .reference import compute_dtype

# A kernel of the CUDA extension keeps one row in shared memory and one slot a lane.
CUDA_MAX_EXPERTS = 1024
CUDA_MAX_TOP_K = 32
CUDA_MAX_GROUPS = 32

_native_forward = torch.ops.trl_r3.gating_forward.default
_native_backward = torch.ops.trl_r3.gating_backward.default


class _MaskedTopkGating(torch.autograd.Function):
    """
    Keeps the logits and the ids for the backward: everything else is cheaper to compute again.

    `problem` is what the raw forward takes after the logits, `formula` what the raw backward takes after the ids, with
    `native` before it. They are tuples because each argument of `apply` costs time on the host, as would marking the
    ids and the status, whose dtypes have no gradient, as not differentiable.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, problem: tuple, formula: tuple) -> Any:
        native = formula[0]
        weights, expert_ids, status = (_native_forward if native else gating_forward_torch)(logits, *problem)
        ctx.save_for_backward(logits, expert_ids)
        ctx.formula = formula
        return weights, expert_ids, status

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weights: torch.Tensor, *_: Any) -> Any:
        logits, expert_ids = ctx.saved_tensors
        native, *formula = ctx.formula
        backward = _native_backward if native else gating_backward_torch
        return backward(grad_weights.contiguous(), logits, expert_ids, *formula), None, None


def _kernels_cover(logits: torch.Tensor, top_k: int, n_group: int) -> bool:
    """Whether the raw ops take this problem, on whatever device and with whatever kernels it meets there."""
    if not logits.is_cuda:
        return True
    return (
        logits.dtype != torch.float64
        and logits.shape[1] <= CUDA_MAX_EXPERTS
        and top_k <= CUDA_MAX_TOP_K
        and n_group <= CUDA_MAX_GROUPS
    )


def masked_topk_gating(
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
    Gate of a mixture-of-experts layer whose selection may be given.

    A row of `recorded` that holds K distinct ids in [0, E) is executed as it stands. A row that holds the missing mark
    in any slot, and any other row, takes the live top-k; `status` says of every row which it was. Weights are computed
    from the live logits of the executed experts, so gradients reach the router (equation of "Stabilizing MoE
    Reinforcement Learning by Aligning Training and Inference Routers", arXiv 2510.11370, for `score="softmax"`; the
    others replace the score and keep the rest).

    Bias and groups take part in the live selection only (auxiliary-loss-free balancing and group-limited routing of
    DeepSeek-V3, arXiv 2412.19437): selection compares score + bias, weights use the score alone.

    Args:
        router_logits (`torch.Tensor`):
            (T, E) logits in bfloat16, float16, float32 or float64. Any strides; T may be 0. Arithmetic is in float32,
            for float64 logits in float64. Selection treats NaN as larger than any number, as `torch.topk` does.
        top_k (`int`):
            K, experts per token, 1 <= K <= E.
        recorded (`torch.Tensor`, *optional*):
            (T, K) ids in uint8, int16, int32 or int64; -1 (255 in uint8) means missing. Without it every row is live.
        score (`str`, *optional*, defaults to `"softmax"`):
            `"softmax"` over all E experts, `"topk_softmax"` over the K executed ones, `"sigmoid"`, or
            `"sqrtsoftplus"` (the square root of softplus). Without bias and groups the live selection compares the
            logits themselves, with which every score rises.
        renormalize (`bool`, *optional*, defaults to `True`):
            Divide the K scores by their sum + `eps`.
        bias (`torch.Tensor`, *optional*):
            (E,) floating point, added to the scores for the selection (to the logits for `"topk_softmax"`). It
            receives no gradient.
        n_group (`int`, *optional*, defaults to `1`):
            Number of equal groups of consecutive experts. The best `topk_group` of them may be selected from.
        topk_group (`int`, *optional*, defaults to `1`):
            Number of groups that may be selected from.
        group_score (`str`, *optional*, defaults to `"top2_sum"`):
            A group is ranked by the sum of its two best experts, or by its best one (`"max"`).
        eps (`float`, *optional*, defaults to `0.0`):
            Added to the sum that renormalisation divides by.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor on the weights, after renormalisation.
        weights_dtype (`torch.dtype`, *optional*, defaults to the dtype of the logits):
            dtype of the returned weights.
        compare_live (`bool`, *optional*, defaults to `True`):
            Compare the recorded experts with the live selection. Without it no row is `DIFFERS_LIVE`, and the compiled
            kernels make no live selection for a recorded row.

    Returns:
        [`GatingOutput`]: weights (T, K), expert_ids (T, K) int64, status (T,) uint8 of [`RowStatus`], on the logits'
        device. Nothing waits for the device. Double backward is not supported.

    Raises:
        ValueError: a shape, size, device or name that does not fit.
        TypeError: an unsupported dtype, or uint8 ids where E > 255, since 255 means missing there.

    Example:

    ```python
    >>> logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    >>> out = masked_topk_gating(logits, 2, torch.tensor([[3, 0]]))
    >>> out.expert_ids.tolist(), RowStatus(out.status.item())
    ([[3, 0]], <RowStatus.DIFFERS_LIVE: 1>)
    ```
    """
    check_gating_arguments(
        router_logits, top_k, recorded, score, bias, n_group, topk_group, group_score, eps, weights_dtype
    )
    if recorded is not None:
        recorded = recorded.contiguous()
    if bias is not None:
        bias = bias.detach().to(compute_dtype(router_logits.dtype)).contiguous()
    score_index = SCORES.index(score)
    problem = (
        top_k, recorded, bias, score_index, renormalize, n_group, topk_group, group_score == "max", eps, scale,
        weights_dtype or router_logits.dtype, compare_live,
    )  # fmt: skip
    formula = (_kernels_cover(router_logits, top_k, n_group), score_index, renormalize, eps, scale)
    return GatingOutput(*_MaskedTopkGating.apply(router_logits.contiguous(), problem, formula))
