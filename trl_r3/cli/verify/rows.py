"""Which rows of a rollout are there, which are missing, and which no router can have selected.

Legend: R rows of a sample, S layer slots (MoE layers, or decoder layers), L MoE layers, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...records.checks import sound_rows
from ...records.record import MISSING, RoutingLayout, pack, select_moe_layers
from .sampling import VerifiedRollout


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
        rows = torch.full((count, len(layout.moe_layers), layout.top_k), MISSING)
        checked.expected += count
        try:
            if ids is not None:
                readable = _readable(ids, count, layout)
                rows[: len(readable)] = readable
        except ValueError as error:
            checked.refused.append(f"sample {sample}: {error}")
            checked.invalid += count
            checked.records.append(pack(rows, layout))
        else:
            _check_sample(checked, rows, layout)
    return checked


def _readable(ids: np.ndarray | Tensor, count: int, layout: RoutingLayout) -> Tensor:
    """(R, L, K) of `torch.int64`, at most `count` rows."""
    if isinstance(ids, np.ndarray):
        ids = torch.from_numpy(ids.astype(np.int64) if ids.dtype != np.uint8 else ids)
    if ids.ndim != 3 or ids.shape[0] > count + 1:
        raise ValueError(
            f"`routed_experts` has shape {tuple(ids.shape)} for {count + 1} tokens, expected {count} rows of layers "
            "and experts."
        )
    selected = select_moe_layers(ids, layout)
    if selected.dtype == torch.uint8 and layout.missing != MISSING:
        return selected[:count].long().masked_fill(selected[:count] == layout.missing, MISSING)
    return selected[:count].long()  # a T-th row was never routed


def _check_sample(checked: CheckedRows, rows: Tensor, layout: RoutingLayout) -> None:
    count = len(rows)
    missing_R = (rows == MISSING).flatten(1).all(1)
    unsound_RL = ~sound_rows(rows, layout.num_experts) & ~missing_R[:, None]
    invalid_R = unsound_RL.any(1)
    there = (~missing_R).nonzero()[:, 0]
    first, last = (int(there[0]), int(there[-1])) if len(there) else (0, -1)
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
