"""The record: its layers and experts, its bytes in memory, its place in a padded batch.

Legend: B batch, T tokens of a sequence (P prompt + C completion), R rows of a record, L MoE layers, D decoder layers,
S slots (L or D), E experts, K experts per token. The row at position p is the routing of *input* token p. A sequence
of T tokens has T - 1 rows: its last token was sampled and never fed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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


def to_record(ids: np.ndarray | Tensor, layout: RoutingLayout, sample: int) -> Tensor:
    """
    Bring what an engine returned for one sample into the form of a record.

    Args:
        ids (`numpy.ndarray` or `torch.Tensor` of shape `(P + C - 1, S, K)`):
            Expert ids of any integer dtype, one slot per MoE layer or one per decoder layer.
        layout ([`RoutingLayout`]):
            Layers and experts of the model.
        sample (`int`):
            Index that errors name.

    Returns:
        `torch.Tensor` of shape `(P + C - 1, L, K)`: Packed ids on the host, in memory of their own.

    Raises:
        `ValueError`: Naming the sample, if the ids have another shape or are no experts of the model.
    """
    if not isinstance(ids, (np.ndarray, Tensor)):
        raise ValueError(
            f"sample {sample}: `routed_experts` is a {type(ids).__name__}, expected a numpy.ndarray or torch.Tensor "
            "of (rows, layers, top_k). Pass one array a sample."
        )
    if ids.ndim != 3:
        raise ValueError(
            f"sample {sample}: `routed_experts` has {ids.ndim} dimensions, shape {tuple(ids.shape)}, expected 3: "
            "(rows, layers, top_k). Pass one array a sample."
        )
    given = ids if isinstance(ids, Tensor) else None
    if isinstance(ids, np.ndarray):
        if ids.dtype.kind not in "iu":
            raise ValueError(
                f"sample {sample}: `routed_experts` has dtype {ids.dtype}, but expert ids are integers. Pass the ids, "
                "not the weights or logits of the router."
            )
        native = ids.dtype.newbyteorder("=")  # PyTorch knows no other order of bytes
        ids = torch.from_numpy(np.require(ids, native, ["C", "W", "O"]))  # copies what the engine still owns
    try:
        selected = select_moe_layers(ids.cpu(), layout)
    except ValueError as error:
        raise ValueError(f"sample {sample}: {error}") from error
    record = pack(selected, layout, sample=sample)
    # whoever gave a view may fill its memory again
    return record.clone() if given is not None and _share_memory(record, given) else record


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


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
    bad = ids.long() >= layout.num_experts  # which int8 may not hold
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


def lay_out(sequences: Sequence[Tensor], prompt_lengths: Sequence[int], prompt_width: int, batch: Tensor, fill: int):
    """
    Fill a batch of left-padded prompts and right-padded completions, in place.

    Args:
        sequences (sequence of `torch.Tensor` of shape `(R_i, ...)`):
            One a sample, on the host: tokens, or rows of a record.
        prompt_lengths (sequence of `int`):
            Prompt tokens P_i of each sample, without padding.
        prompt_width (`int`):
            Width of the padded prompts: element r of sample i goes to position `prompt_width - P_i + r`.
        batch (`torch.Tensor` of shape `(B, T, ...)`):
            What is filled, on the host.
        fill (`int`):
            What stands everywhere else.

    Raises:
        `ValueError`: If a prompt or a sequence does not fit.
    """
    rows = batch.numpy()  # what NumPy takes for a slice does not count beside a sample of 1,000 tokens
    for i, (sequence, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        start = prompt_width - prompt_length
        end = start + sequence.shape[0]
        if start < 0 or end > batch.shape[1]:
            raise ValueError(
                f"sample {i}: {sequence.shape[0]} rows with a prompt of {prompt_length} tokens do not fit into a "
                f"batch {batch.shape[1]} wide whose prompts are {prompt_width} wide. Pass the widths of the padded "
                "batch."
            )
        rows[i, :start], rows[i, start:end], rows[i, end:] = fill, sequence.numpy(), fill


def align(
    records: Sequence[Tensor], prompt_lengths: Sequence[int], prompt_width: int, width: int, layout: RoutingLayout
) -> Tensor:
    """
    Lay per-sample records into a batch of left-padded prompts and right-padded completions.

    Args:
        records (sequence of `torch.Tensor` of shape `(R_i, L, K)`):
            Packed records, one a sample.
        prompt_lengths, prompt_width:
            As in [`lay_out`].
        width (`int`):
            Width T of the padded batch, prompts and completions.
        layout ([`RoutingLayout`]):
            Layers and experts of the model.

    Returns:
        `torch.Tensor` of shape `(B, T, L, K)` and `layout.storage_dtype`, missing wherever no row was recorded.

    Raises:
        `ValueError`: If a prompt or a record does not fit into the given widths.
    """
    size = (len(records), width, len(layout.moe_layers), layout.top_k)
    batch = torch.empty(size, dtype=layout.storage_dtype, device="cpu")
    lay_out(records, prompt_lengths, prompt_width, batch, layout.missing)
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
