"""Which rows of a rollout are there, which are missing, and which no router can have selected.

Legend: R rows of a sample, S layer slots (MoE layers, or decoder layers), L MoE layers, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...records.checks import sound_rows
from ...records.layout import MISSING, RoutingLayout, select_moe_layers
from ...records.storage import missing_rows, pack
from .rollout import VerifiedRollout


@dataclass
class CheckedRows:
    """
    The routes of a rollout, row by row.

    Args:
        records (list of `torch.Tensor` of shape `(P + C - 1, L, K)`):
            Packed; what is missing or invalid is missing here.
        expected, present, missing, invalid (`int`):
            Numbers of rows. `present` are neither missing nor invalid.
        missing_at_start, missing_at_end (`int`):
            Of the missing rows, those before the first row of their sample, and behind its last.
        all_zero (`int`):
            Of the invalid rows, those that hold nothing but zeros in some MoE layer.
        out_of_range (`int`):
            Of the invalid rows, those that name an expert which the model does not have.
        refused (`list[str]`):
            Why whole samples could not be read.
        lowest_invalid_layer (`int`, *optional*):
            Decoder layer.
    """

    records: list[Tensor] = field(default_factory=list)
    expected: int = 0
    present: int = 0
    missing: int = 0
    invalid: int = 0
    missing_at_start: int = 0
    missing_at_end: int = 0
    all_zero: int = 0
    out_of_range: int = 0
    refused: list[str] = field(default_factory=list)
    lowest_invalid_layer: int | None = None


def check_rollout_rows(rollout: VerifiedRollout, layout: RoutingLayout) -> CheckedRows:
    """
    Go through the routes of a rollout.

    Args:
        rollout ([`VerifiedRollout`]):
            As the engine returned it.
        layout ([`RoutingLayout`]):
            Layers and experts of the model.

    Returns:
        [`CheckedRows`].
    """
    checked = CheckedRows(refused=list(rollout.notes))
    pairs = zip(rollout.prompt_ids, rollout.completion_ids, strict=True)
    for sample, ((prompt, completion), ids) in enumerate(zip(pairs, rollout.routes, strict=True)):
        count = len(prompt) + len(completion) - 1
        _check_sample(checked, _readable(ids, layout, sample, checked), count, layout, sample)
    return checked


def _readable(
    ids: np.ndarray | Tensor | None, layout: RoutingLayout, sample: int, checked: CheckedRows
) -> Tensor | None:
    """(R, L, K) of `torch.int64`, or `None` where nothing can be read."""
    if ids is None:
        return None
    if isinstance(ids, np.ndarray):
        ids = torch.from_numpy(ids.astype(np.int64))
    try:
        if ids.ndim != 3:
            raise ValueError(f"`routed_experts` has {ids.ndim} dimensions, shape {tuple(ids.shape)}, expected 3.")
        selected = select_moe_layers(ids, layout)
    except ValueError as error:
        checked.refused.append(f"sample {sample}: {error}")
        return None
    if selected.dtype == torch.uint8 and layout.missing != MISSING:
        selected = selected.long().masked_fill(selected == layout.missing, MISSING)
    return selected.long()


def _check_sample(checked: CheckedRows, ids: Tensor | None, count: int, layout: RoutingLayout, sample: int) -> None:
    shape = (count, len(layout.moe_layers), layout.top_k)
    rows = torch.full(shape, MISSING)
    if ids is not None and ids.shape[0] > count + 1:
        checked.refused.append(f"sample {sample}: {ids.shape[0]} rows for {count + 1} tokens, expected {count}.")
        checked.expected, checked.invalid = checked.expected + count, checked.invalid + count
        checked.records.append(pack(rows, layout))
        return
    if ids is not None:
        rows[: ids.shape[0]] = ids[:count]  # a T-th row was never routed
    missing_R = (rows == MISSING).flatten(1).all(1)
    unsound_RL = ~sound_rows(rows, layout.num_experts) & ~missing_R[:, None]
    invalid_R = unsound_RL.any(1)
    there = (~missing_R).nonzero()[:, 0]
    first, last = (int(there[0]), int(there[-1])) if len(there) else (0, -1)
    checked.expected += count
    checked.missing += int(missing_R.sum())
    checked.missing_at_start += first
    checked.missing_at_end += count - 1 - last
    checked.invalid += int(invalid_R.sum())
    checked.all_zero += int(((rows == 0).all(-1) & unsound_RL).any(1).sum())
    checked.out_of_range += int((((rows >= layout.num_experts) | (rows < MISSING)).any(-1) & unsound_RL).any(1).sum())
    checked.present += int((~missing_R & ~invalid_R).sum())
    if unsound_RL.any():
        layer = layout.moe_layers[int(unsound_RL.any(0).nonzero()[0])]
        checked.lowest_invalid_layer = min(layer, checked.lowest_invalid_layer or layer)
    checked.records.append(pack(rows.masked_fill(invalid_R[:, None, None], MISSING), layout))


def recorded(record: Tensor, layout: RoutingLayout) -> Tensor:
    """Which rows of a packed record (R, L, K) are there."""
    return ~missing_rows(record, layout)
