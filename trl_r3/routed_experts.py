"""The record as data: which experts served each token, stored compactly, validated, aligned to a padded batch.

Legend: B batch, T tokens of a sequence, R rows of a record, L MoE layers, D decoder layers, S slots (L or D), E
experts, K experts per token. The row at position p is the routing of *input* token p. A sequence of T tokens has T - 1
rows: its last token was sampled and never fed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MISSING = -1  # in signed dtypes
MISSING_UINT8 = 255  # in uint8, free while E <= 255


@dataclass(frozen=True)
class RoutingShape:
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


def select_moe_layers(routed_experts: Tensor, shape: RoutingShape) -> Tensor:
    """
    Drop the slots of dense layers.

    Args:
        routed_experts (`torch.Tensor` of shape `(..., S, K)`):
            Ids with one slot per MoE layer, or one per decoder layer (the layout of vLLM and SGLang).
        shape ([`RoutingShape`]):
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
    if routed_experts.ndim < 2 or routed_experts.shape[-1] != shape.top_k:
        raise ValueError(
            f"`routed_experts` has shape {tuple(routed_experts.shape)}, but the model routes a token to "
            f"{shape.top_k} experts, so the last dimension must be {shape.top_k}. Pass the record of this model."
        )
    slots = routed_experts.shape[-2]
    if slots == len(shape.moe_layers):
        return routed_experts
    if slots == shape.num_decoder_layers:
        first, last = shape.moe_layers[0], shape.moe_layers[-1]
        if last - first + 1 == len(shape.moe_layers):  # dense layers only before and after: no need to gather
            return routed_experts[..., first : last + 1, :].contiguous()
        return routed_experts[..., list(shape.moe_layers), :]
    raise ValueError(
        f"`routed_experts` has {slots} layer slots, but the model has {len(shape.moe_layers)} MoE layers and "
        f"{shape.num_decoder_layers} decoder layers. Pass one slot per MoE layer or one per decoder layer."
    )


def pack(routed_experts: Tensor, shape: RoutingShape, *, sample: int | None = None) -> Tensor:
    """
    Store ids in the fewest bytes.

    Args:
        routed_experts (`torch.Tensor` of shape `(B, R, L, K)` or `(R, L, K)`):
            Ids of any integer dtype; missing is -1, or 255 in `torch.uint8` while E <= 255.
        shape ([`RoutingShape`]):
            Layers and experts of the model.
        sample (`int`, *optional*):
            Index that errors name, for a record of one sample.

    Returns:
        `torch.Tensor` of the same shape and `shape.storage_dtype`.

    Raises:
        `ValueError`: If an id is no expert of the model: it would wrap around to a wrong one.
    """
    ids = routed_experts
    if ids.dtype in (torch.uint16, torch.uint32, torch.uint64):  # these have hardly a kernel in PyTorch
        ids = ids.to(torch.int64)
    if ids.numel():
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < MISSING or high >= shape.num_experts:  # or 255 for missing, so look closer
            _check_range(ids, shape, sample)
    if shape.storage_dtype == torch.uint8 and ids.dtype != torch.uint8:
        # -1 wraps around to 255 by the rules of integer conversion, and every other id is smaller
        return ids.to(torch.uint8)
    return ids.to(shape.storage_dtype)


def _check_range(ids: Tensor, shape: RoutingShape, sample: int | None) -> None:
    bad = ids >= shape.num_experts
    if ids.dtype == torch.uint8:
        bad &= ids != shape.missing
    else:
        bad |= ids < MISSING
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        first = where[0] if sample is None else sample
        row, layer = where[-3:-1]
        raise ValueError(
            f"{place(shape, first, layer, row)}: expert id {int(ids[where])} is outside [0, {shape.num_experts}). "
            f"Pass the record of this model; a missing row is -1."
        )


def unpack(record: Tensor, shape: RoutingShape) -> Tensor:
    """
    Undo [`pack`].

    Returns:
        `torch.Tensor` of the same shape and dtype `torch.int16`; missing rows are -1.
    """
    ids = record.to(torch.int16)
    return ids.masked_fill_(ids == shape.missing, MISSING) if shape.missing != MISSING else ids


def missing_rows(record: Tensor, shape: RoutingShape) -> Tensor:
    """
    Which rows of a packed record hold no selection.

    Returns:
        `torch.BoolTensor`: The shape of `record` without its last two dimensions. [`check_rows`] guarantees that a row
        is whole or missing, so one id tells.
    """
    return record[..., 0, 0] == shape.missing


def place(shape: RoutingShape, sample: int, layer: int, row: int | None = None) -> str:
    """Where something is, for an error."""
    where = "" if row is None else f", row {row}"
    return f"sample {sample}, decoder layer {shape.moe_layers[layer]} (MoE layer {layer}){where}"


def align(
    records: Sequence[Tensor],
    prompt_lengths: Sequence[int],
    prompt_width: int,
    width: int,
    shape: RoutingShape,
) -> Tensor:
    """
    Lay per-sample records into a batch of left-padded prompts and right-padded completions.

    Args:
        records (sequence of `torch.Tensor` of shape `(R_i, L, K)`):
            Packed records, one a sample.
        prompt_lengths (sequence of `int`):
            Prompt tokens P_i of each sample, without padding.
        prompt_width (`int`):
            Width of the padded prompts: row r of sample i goes to position `prompt_width - P_i + r`.
        width (`int`):
            Width of the padded batch, prompts and completions.
        shape ([`RoutingShape`]):
            Layers and experts of the model.

    Returns:
        `torch.Tensor` of shape `(B, width, L, K)` and `shape.storage_dtype`, missing wherever no row was recorded.

    Raises:
        `ValueError`: If a prompt or a record does not fit into the given widths.
    """
    batch = torch.full(
        (len(records), width, len(shape.moe_layers), shape.top_k), shape.missing, dtype=shape.storage_dtype
    )
    for i, (record, prompt_length) in enumerate(zip(records, prompt_lengths, strict=True)):
        start = prompt_width - prompt_length
        if start < 0 or start + record.shape[0] > width:
            raise ValueError(
                f"sample {i}: a record of {record.shape[0]} rows with a prompt of {prompt_length} tokens does not fit "
                f"into a batch {width} wide whose prompts are {prompt_width} wide. Pass the widths of the padded "
                "batch."
            )
        batch[i, start : start + record.shape[0]] = record
    return batch
