"""Refuse records that no router can have made, and those of other tokens.

Legend: R rows of a record, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .routed_experts import RoutingShape, place

_STALE_RUN = 8  # identical rows over all layers at least, for
_STALE_TOKENS = 4  # so many different tokens: an engine handed out a stale buffer
_STALE_BITS = 64  # what a run has to repeat: a few layers with a few experts agree by chance


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


def _check_torn(ids: np.ndarray, shape: RoutingShape, sample: int) -> np.ndarray:
    is_missing = ids == shape.missing
    missing_R = is_missing[:, 0, 0]
    torn = is_missing != missing_R[:, None, None]
    if torn.any():
        row, layer, _ = np.argwhere(torn)[0]
        raise ValueError(
            f"{place(shape, sample, layer, row)}: {is_missing[row].sum()} of {is_missing[row].size} ids of the row "
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
                f"{place(shape, sample, layer, row)}: expert {repeated[0]} appears {chosen.count(repeated[0])} times "
                f"among {shape.top_k} ids {chosen}. A router selects distinct experts: the engine did not capture "
                "this row, or its layers are mapped wrongly."
            )


def _check_zero_layers(whole: np.ndarray, shape: RoutingShape, sample: int) -> None:
    zero_L = (whole == 0).all((0, 2))
    if zero_L.any():
        raise ValueError(
            f"{place(shape, sample, int(zero_L.argmax()))}: all {len(whole)} rows are expert 0 of "
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
                f"{place(shape, sample, 0, start)}: {end - start} rows from here repeat the same ids in all "
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
