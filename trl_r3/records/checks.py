"""
What no router can have selected: rows that are torn, out of range or repeat an expert, records of another length or of
other tokens.

Legend: B batch, T tokens of a sequence, R rows of a record, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .record import RoutingLayout, place

_CHUNK = 1 << 16  # rows that are looked at together


class MisalignedRecordError(RuntimeError):
    """A record that belongs to other tokens, layers or samples than those it would be replayed on."""


def sound_rows(ids: Tensor, num_experts: int) -> Tensor:
    """
    Which rows hold K distinct experts of the model.

    Args:
        ids (`torch.Tensor` of shape `(..., K)`):
            Ids of any integer dtype.
        num_experts (`int`):
            Number of experts E.

    Returns:
        `torch.BoolTensor`: The shape of `ids` without its last dimension.
    """
    ordered = ids.sort(-1).values
    distinct = (ordered[..., 1:] != ordered[..., :-1]).all(-1)
    return distinct & (ordered[..., 0] >= 0) & (ordered[..., -1] < num_experts)


def check_rows(record: Tensor, layout: RoutingLayout, *, sample: int = 0) -> None:
    """
    Refuse rows that no router can have selected.

    Args:
        record (`torch.Tensor` of shape `(R, L, K)`):
            Packed ids of one sample, on the host.
        layout ([`RoutingLayout`]):
            Layers and experts of the model.
        sample (`int`, *optional*, defaults to `0`):
            Index that errors name.

    Raises:
        `ValueError`: Naming sample, layer and both numbers, for a row of which only a part is missing, or that names
        an expert twice.
    """
    if record.numel() == 0:
        return
    ids = record.numpy()
    some_missing = ids.max() >= layout.num_experts or ids.min() < 0
    whole = ids[~_missing_whole(ids, layout, sample)] if some_missing else ids
    if _any_repeats(whole.reshape(-1, layout.top_k)):
        _refuse_repeats(record, layout, sample)


def _any_repeats(ids: np.ndarray) -> bool:
    """Whether any row of (N, K) has an id twice."""
    top_k = ids.shape[1]
    for first in range(0, len(ids), _CHUNK):  # what is compared stays in the cache, however long a sample is
        # slot by slot in contiguous memory: a comparison of planes runs at the speed of memory
        planes = np.ascontiguousarray(ids[first : first + _CHUNK].T)
        if any((planes[slot:] == planes[slot - 1]).any() for slot in range(1, top_k)):
            return True
    return False


def _missing_whole(ids: np.ndarray, layout: RoutingLayout, sample: int) -> np.ndarray:
    is_missing = ids == layout.missing
    missing_R = is_missing[:, 0, 0]
    torn = is_missing != missing_R[:, None, None]
    if torn.any():
        row, layer, _ = np.argwhere(torn)[0]
        raise ValueError(
            f"{place(layout, sample, layer, row)}: {is_missing[row].sum()} of {is_missing[row].size} ids of the row "
            "are missing. A row is whole or missing: set all of its ids to -1."
        )
    return missing_R


def _refuse_repeats(record: Tensor, layout: RoutingLayout, sample: int) -> None:
    unsound_RL = ~sound_rows(record, layout.num_experts) & (record[..., 0] != layout.missing)
    row, layer = unsound_RL.nonzero()[0].tolist()
    chosen = record[row, layer].tolist()
    repeated = max(chosen, key=chosen.count)
    raise ValueError(
        f"{place(layout, sample, layer, row)}: expert {repeated} appears {chosen.count(repeated)} times among "
        f"{layout.top_k} ids {chosen}. A router selects distinct experts: the engine did not capture this row, or its "
        "layers are mapped wrongly."
    )


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


def rows_that_matter(predicts_BT: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """
    Which rows can influence the loss: those at or before a prediction that the loss counts, in the same document. A
    later token attends to every earlier one, so another expert there is another hidden state here.

    Args:
        predicts_BT (`torch.BoolTensor` of shape `(B, T)`):
            Whether the loss counts the prediction that is made at a position (of the token after it).
        position_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
            Positions in packed documents; each 0 begins one.

    Returns:
        `torch.BoolTensor` of shape `(B, T)`.
    """
    after = predicts_BT.flip(1).cumsum(1).flip(1)
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != predicts_BT.shape[1]:
        return after > 0
    num_tokens = predicts_BT.shape[1]
    positions = torch.arange(num_tokens, device=predicts_BT.device)
    starts = torch.where(position_ids.expand_as(predicts_BT) == 0, positions, num_tokens)
    first_from = starts.flip(1).cummin(1).values.flip(1)
    next_start = torch.nn.functional.pad(first_from[:, 1:], (0, 1), value=num_tokens)
    return after - torch.nn.functional.pad(after, (0, 1)).gather(1, next_start) > 0


def check_fed(
    forwards: Sequence[Tensor], tokens: Sequence[Tensor | None], sequences_BT: Tensor, prompt_width: int
) -> None:
    """
    Refuse routes of other tokens than `generate` returns. Forwards beyond the end do no harm: it may stop late.

    Args:
        forwards (sequence of `torch.Tensor` of shape `(B, N, L, K)`):
            Routes of its forwards, of N tokens each.
        tokens (sequence of `torch.Tensor` of shape `(B, N)`, or `None`):
            What was fed to each, where it is known: a vision-language model feeds embeddings.
        sequences_BT (`torch.Tensor` of shape `(B, T)`):
            Prompts and completions.
        prompt_width (`int`):
            Tokens of the prompts, with padding.

    Raises:
        `RuntimeError`: If no forward has run, or not one after the other over the first T - 1 tokens.
    """
    if not forwards:
        raise RuntimeError(
            "`generate` returned without a forward of the model, so there is nothing to record: something else made "
            "its sequences. Let the model generate them, or set `use_routing_replay=False`."
        )
    num_rows, fed = sequences_BT.shape[1] - 1, sum(forward.shape[1] for forward in forwards)
    known = [each for each in tokens if each is not None]
    if len(known) == len(forwards):
        fed_BT = torch.cat(known, dim=1)[:, :num_rows]
        same = torch.equal(fed_BT, sequences_BT[:, :num_rows].to(fed_BT.device))
    else:
        same = fed == num_rows
    if not same:
        raise RuntimeError(
            f"`generate` fed {fed} tokens in {len(forwards)} forwards, but not the first {num_rows} tokens of the "
            f"sequences one after the other (prompt of {prompt_width}): its cache was off or held a part of the "
            "prompt, or something else called the model meanwhile. Set `use_cache=True`, pass no `cache` (before "
            "Transformers 5.24: `past_key_values`), disable gradient checkpointing while generating, and use no "
            "logits processor that calls the model."
        )
