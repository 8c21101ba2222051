"""The record in memory: stored in few bytes, aligned to a padded batch and taken out of one.

Legend: B batch, T tokens of a sequence (P prompt + C completion), R rows of a record, L MoE layers, E experts, K
experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import MISSING, RoutingLayout, place


def pack(routed_experts: Tensor, layout: RoutingLayout, *, sample: int | None = None) -> Tensor:
    """
    Store ids in the fewest bytes.

    Args:
        routed_experts (`torch.Tensor` of shape `(B, R, L, K)` or `(R, L, K)`):
            Ids of any integer dtype; missing is -1, or 255 in `torch.uint8` while E <= 255.
        layout ([`RoutingLayout`]):
            Layers and experts of the model.
        sample (`int`, *optional*):
            Index that errors name, for a record of one sample.

    Returns:
        `torch.Tensor` of the same shape and `layout.storage_dtype`.

    Raises:
        `ValueError`: If an id is no expert of the model: it would wrap around to a wrong one.
    """
    ids = routed_experts
    if ids.dtype in (torch.uint16, torch.uint32, torch.uint64):  # these have hardly a kernel in PyTorch
        ids = ids.to(torch.int64)
    if ids.numel():
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < MISSING or high >= layout.num_experts:  # or 255 for missing, so look closer
            _check_range(ids, layout, sample)
    if layout.storage_dtype == torch.uint8 and ids.dtype != torch.uint8:
        # -1 wraps around to 255 by the rules of integer conversion, and every other id is smaller
        return ids.to(torch.uint8)
    return ids.to(layout.storage_dtype)


def _check_range(ids: Tensor, layout: RoutingLayout, sample: int | None) -> None:
    bad = ids >= layout.num_experts
    if ids.dtype == torch.uint8:
        bad &= ids != layout.missing
    else:
        bad |= ids < MISSING
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        first = where[0] if sample is None else sample
        row, layer = where[-3:-1]
        raise ValueError(
            f"{place(layout, first, layer, row)}: expert id {int(ids[where])} is outside [0, {layout.num_experts}). "
            f"Pass the record of this model; a missing row is -1."
        )


def unpack(record: Tensor, layout: RoutingLayout) -> Tensor:
    """
    Undo [`pack`].

    Returns:
        `torch.Tensor` of the same shape and dtype `torch.int16`; missing rows are -1.
    """
    ids = record.to(torch.int16)
    return ids.masked_fill_(ids == layout.missing, MISSING) if layout.missing != MISSING else ids


def missing_rows(record: Tensor, layout: RoutingLayout) -> Tensor:
    """
    Which rows of a packed record hold no selection.

    Returns:
        `torch.BoolTensor`: The shape of `record` without its last two dimensions. [`check_rows`] guarantees that a row
        is whole or missing, so one id tells.
    """
    return record[..., 0, 0] == layout.missing


def align(
    records: Sequence[Tensor],
    prompt_lengths: Sequence[int],
    prompt_width: int,
    width: int,
    layout: RoutingLayout,
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
        layout ([`RoutingLayout`]):
            Layers and experts of the model.

    Returns:
        `torch.Tensor` of shape `(B, width, L, K)` and `layout.storage_dtype`, missing wherever no row was recorded.

    Raises:
        `ValueError`: If a prompt or a record does not fit into the given widths.
    """
    batch = torch.empty((len(records), width, len(layout.moe_layers), layout.top_k), dtype=layout.storage_dtype)
    rows = batch.numpy()  # what NumPy takes for a slice does not count beside a sample of 1,000 tokens
    for i, (record, prompt_length) in enumerate(zip(records, prompt_lengths, strict=True)):
        start = prompt_width - prompt_length
        if start < 0 or start + record.shape[0] > width:
            raise ValueError(
                f"sample {i}: a record of {record.shape[0]} rows with a prompt of {prompt_length} tokens does not fit "
                f"into a batch {width} wide whose prompts are {prompt_width} wide. Pass the widths of the padded "
                "batch."
            )
        end = start + record.shape[0]
        rows[i, :start], rows[i, start:end], rows[i, end:] = layout.missing, record.numpy(), layout.missing
    return batch


def slice_samples(
    batch: Tensor, prompt_width: int, prompts: Sequence[int], completions: Sequence[int]
) -> list[Tensor]:
    """
    Undo the padding of a batch of left-padded prompts and right-padded completions.

    Args:
        batch (`torch.Tensor` of shape `(B, T, L, K)`):
            Ids, one row a position.
        prompt_width (`int`):
            Width of the padded prompts.
        prompts, completions (sequence of `int`):
            P_i and C_i, without padding.

    Returns:
        list of `torch.Tensor` of shape `(P_i + C_i - 1, L, K)`, in memory of their own.
    """
    return [
        sample[prompt_width - p : prompt_width + c - 1].clone()
        for sample, p, c in zip(batch, prompts, completions, strict=True)
    ]
