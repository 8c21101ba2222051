"""What a model's record looks like: its layers, its experts, and the value of a missing row.

Legend: T tokens of a sequence, L MoE layers, D decoder layers, S slots (L or D), E experts, K experts per token. The
row at position p is the routing of *input* token p. A sequence of T tokens has T - 1 rows: its last token was sampled
and never fed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MISSING = -1  # in signed dtypes
MISSING_UINT8 = 255  # in uint8, free while E <= 255


@dataclass(frozen=True)
class RoutingLayout:
    """
    What a model's record looks like.

    Args:
        moe_layers (`tuple[int, ...]`):
            Decoder-layer indices of the L MoE layers, ascending.
        num_decoder_layers (`int`):
            Number of decoder layers D, dense ones included.
        num_experts (`int`):
            Number of experts E a router chooses from.
        top_k (`int`):
            Number of experts K a token is routed to.
    """

    moe_layers: tuple[int, ...]
    num_decoder_layers: int
    num_experts: int
    top_k: int

    @property
    def storage_dtype(self) -> torch.dtype:
        """`torch.uint8` while E <= 255, else `torch.int16`: the fewest bytes that keep a value for "missing"."""
        return torch.uint8 if self.num_experts <= MISSING_UINT8 else torch.int16

    @property
    def missing(self) -> int:
        """The value that marks a missing row in `storage_dtype`."""
        return MISSING_UINT8 if self.storage_dtype == torch.uint8 else MISSING


def select_moe_layers(routed_experts: Tensor, layout: RoutingLayout) -> Tensor:
    """
    Drop the slots of dense layers.

    Args:
        routed_experts (`torch.Tensor` of shape `(..., S, K)`):
            Ids with one slot per MoE layer, or one per decoder layer (the layout of vLLM and SGLang).
        layout ([`RoutingLayout`]):
            Layers and experts of the model.

    Returns:
        `torch.Tensor` of shape `(..., L, K)`.

    Raises:
        `ValueError`: If S is neither L nor D, or the last dimension is not K.
    """
    dtype = routed_experts.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise ValueError(
            f"`routed_experts` has dtype {dtype}, but expert ids are integers. Pass the ids, not the "
            f"weights or logits of the router."
        )
    if routed_experts.ndim < 2 or routed_experts.shape[-1] != layout.top_k:
        raise ValueError(
            f"`routed_experts` has shape {tuple(routed_experts.shape)}, but the model routes a token to "
            f"{layout.top_k} experts, so the last dimension must be {layout.top_k}. Pass the record of this model."
        )
    slots = routed_experts.shape[-2]
    if slots == len(layout.moe_layers):
        return routed_experts
    if slots == layout.num_decoder_layers:
        first, last = layout.moe_layers[0], layout.moe_layers[-1]
        if last - first + 1 == len(layout.moe_layers):  # dense layers only before and after: no need to gather
            return routed_experts[..., first : last + 1, :].contiguous()
        return routed_experts[..., list(layout.moe_layers), :]
    raise ValueError(
        f"`routed_experts` has {slots} layer slots, but the model has {len(layout.moe_layers)} MoE layers and "
        f"{layout.num_decoder_layers} decoder layers. Pass one slot per MoE layer or one per decoder layer."
    )


def place(layout: RoutingLayout, sample: int, layer: int, row: int | None = None) -> str:
    """Where something is, for an error."""
    where = "" if row is None else f", row {row}"
    return f"sample {sample}, decoder layer {layout.moe_layers[layer]} (MoE layer {layer}){where}"
