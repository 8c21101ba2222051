"""How far two selections agree, as sets: the order of the ids says nothing.

Legend: L MoE layers, K experts per token.
"""

from __future__ import annotations

from torch import Tensor


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
