"""The record as data: which experts served each token, stored compactly, validated, aligned to a padded batch.

Legend: B batch, T tokens of a sequence, R rows of a record, L MoE layers, D decoder layers, S slots (L or D), E
experts, K experts per token. The row at position p is the routing of *input* token p. A sequence of T tokens has T - 1
rows: its last token was sampled and never fed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MISSING = -1  # in signed dtypes
MISSING_UINT8 = 255  # in uint8, free while E <= 255
_STALE_RUN = 8  # identical rows over all layers at least, for
_STALE_TOKENS = 4  # so many different tokens: an engine handed out a stale buffer
_STALE_BITS = 64  # what a run has to repeat: a few layers with a few experts agree by chance


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
            f"{_place(shape, first, layer, row)}: expert id {int(ids[where])} is outside [0, {shape.num_experts}). "
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


def check_rows(record: Tensor, shape: RoutingShape, *, sample: int = 0) -> None:
    """
    Refuse rows that no router can have selected.

    Args:
        record (`torch.Tensor` of shape `(R, L, K)`):
            Packed ids of one sample.
        shape ([`RoutingShape`]):
            Layers and experts of the model.
        sample (`int`, *optional*, defaults to `0`):
            Index that errors name.

    Raises:
        `ValueError`: Naming sample, layer and both numbers, for a row of which only a part is missing, a duplicate id
        in a row, or a layer that is all zero.
    """
    if record.numel() == 0:
        return
    ids = record.numpy(force=True)
    whole = ids
    if ids.max() >= shape.num_experts or ids.min() < 0:
        missing_R = _check_torn(ids, shape, sample)
        whole = ids[~missing_R]
    _check_duplicates(ids, whole, shape, sample)
    if shape.top_k == 1 and shape.num_experts > 1 and len(whole) >= 8:  # with K > 1 a zero row has duplicates
        _check_zero_layers(whole, shape, sample)


def _place(shape: RoutingShape, sample: int, layer: int, row: int | None = None) -> str:
    where = "" if row is None else f", row {row}"
    return f"sample {sample}, decoder layer {shape.moe_layers[layer]} (MoE layer {layer}){where}"


def _check_torn(ids: np.ndarray, shape: RoutingShape, sample: int) -> np.ndarray:
    is_missing = ids == shape.missing
    missing_R = is_missing[:, 0, 0]
    torn = is_missing != missing_R[:, None, None]
    if torn.any():
        row, layer, _ = np.argwhere(torn)[0]
        raise ValueError(
            f"{_place(shape, sample, layer, row)}: {is_missing[row].sum()} of {is_missing[row].size} ids of the row "
            "are missing. A row is whole or missing: set all of its ids to -1."
        )
    return missing_R


def _check_duplicates(ids: np.ndarray, whole: np.ndarray, shape: RoutingShape, sample: int) -> None:
    # slot by slot in contiguous memory: a comparison of two planes runs at the speed of memory
    planes = np.ascontiguousarray(whole.reshape(-1, shape.top_k).T)
    if not any((planes[i] == planes[j]).any() for i in range(shape.top_k) for j in range(i)):
        return
    for row, layer in np.ndindex(ids.shape[:2]):
        chosen = ids[row, layer].tolist()
        repeated = [expert for expert in chosen if chosen.count(expert) > 1 and expert != shape.missing]
        if repeated:
            raise ValueError(
                f"{_place(shape, sample, layer, row)}: expert {repeated[0]} appears {chosen.count(repeated[0])} times "
                f"among {shape.top_k} ids {chosen}. A router selects distinct experts: the engine did not capture "
                "this row, or its layers are mapped wrongly."
            )


def _check_zero_layers(whole: np.ndarray, shape: RoutingShape, sample: int) -> None:
    zero_L = (whole == 0).all((0, 2))
    if zero_L.any():
        raise ValueError(
            f"{_place(shape, sample, int(zero_L.argmax()))}: all {len(whole)} rows are expert 0 of "
            f"{shape.num_experts}. The engine did not capture this layer: check that it supports routed experts with "
            "its MoE kernel."
        )


def check_stale(record: Tensor, tokens: Tensor | Sequence[int], shape: RoutingShape, *, sample: int = 0) -> None:
    """
    Refuse a run of repeated rows, as an engine leaves them that hands out a stale buffer.

    Args:
        record (`torch.Tensor` of shape `(R, L, K)`):
            Packed ids of one sample.
        tokens (`torch.Tensor` or `list[int]` of shape `(R,)` or longer):
            Input ids of the rows. Rows may repeat where the token does.
        shape ([`RoutingShape`]):
            Layers and experts of the model.
        sample (`int`, *optional*, defaults to `0`):
            Index that errors name.

    Raises:
        `ValueError`: If 8 consecutive rows (more where rows hold little) agree in every layer although 4 different
        tokens or more were fed, and other rows of the sample differ.
    """
    row_bits = len(shape.moe_layers) * math.log2(math.comb(shape.num_experts, shape.top_k))
    run = max(_STALE_RUN, 1 + math.ceil(_STALE_BITS / max(row_bits, 1e-9)))
    rows = record.shape[0]
    if rows <= run or not _repeats(record[:, 0, 0], run):  # one id of each row rules most records out
        return
    recorded_R = (record[:, 0, 0] != shape.missing).cpu()
    changes_R = torch.ones(rows + 1, dtype=torch.bool)  # where a run of equal rows begins
    changes_R[1:-1] = (record[1:] != record[:-1]).flatten(1).any(1).cpu()
    starts = changes_R.nonzero()[:, 0].tolist()
    tokens = torch.as_tensor(tokens).tolist()
    for start, end in zip(starts, starts[1:], strict=False):
        fed = len(set(tokens[start:end]))
        # a router may be constant all along, a buffer is stale in part
        if end - start >= run and fed >= _STALE_TOKENS and recorded_R[start] and end - start < int(recorded_R.sum()):
            raise ValueError(
                f"{_place(shape, sample, 0, start)}: {end - start} rows from here repeat the same ids in all "
                f"{len(shape.moe_layers)} MoE layers, although {fed} different tokens were fed. The engine handed out "
                f"stale rows: upgrade it, or drop the sample."
            )


def _repeats(first_R: Tensor, run: int) -> bool:
    changed_R = np.diff(first_R.numpy(force=True).astype(np.int32)) != 0
    changes = np.flatnonzero(np.concatenate([[True], changed_R, [True]]))
    return bool((np.diff(changes) >= run).any())


def check_length(num_rows: int, num_tokens: int, sample: int) -> None:
    """
    Refuse a record that does not belong to its tokens: it has T - 1 rows (or T, the last one unused) for T tokens.

    Raises:
        `ValueError`: Naming the sample and both numbers.
    """
    if num_rows not in (num_tokens - 1, num_tokens):
        raise ValueError(
            f"sample {sample}: the record has {num_rows} rows for {num_tokens} tokens, expected {num_tokens - 1} (the "
            f"last token is sampled, never fed). Pass the record of these tokens, truncated where they were."
        )


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
