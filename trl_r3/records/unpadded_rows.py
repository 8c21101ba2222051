"""Forwards without padding: sequences one after the other in one row, told by positions that begin again.

Legend: N tokens of a forward, B batch, T tokens of a padded sequence, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import MisalignedRecordError
from .record import RoutingLayout, slice_samples

if TYPE_CHECKING:
    from .samples import Sample


def unpadded_positions(kwargs: Mapping[str, Any], num_tokens: int) -> Any:
    """Position ids of a forward of one row, which may hold several sequences where its mask calls nothing padding."""
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is None:
        return None
    is_padded = torch.is_tensor(mask) and mask.shape == (1, num_tokens) and not bool(mask.all())
    return None if is_padded else positions


def sequence_lengths(position_ids: Any, batch_size: int, num_tokens: int) -> list[int] | None:
    """
    Lengths of the sequences that a forward holds one after the other.

    Args:
        position_ids (`torch.Tensor` of shape `(1, N)`, *optional*):
            Of the forward.
        batch_size, num_tokens (`int`):
            Its size.

    Returns:
        list of `int`, *optional*: `None` where it is no such forward: of several rows, or with positions that do not
        count up from 0 in each sequence.
    """
    if batch_size != 1 or not torch.is_tensor(position_ids) or position_ids.shape != (1, num_tokens):
        return None
    positions_N = position_ids[0].cpu()
    starts = (positions_N == 0).nonzero()[:, 0]
    if not len(starts) or starts[0] != 0:
        return None
    lengths = torch.diff(starts, append=torch.tensor([num_tokens], device="cpu")).tolist()
    counted = torch.cat([torch.arange(length, device="cpu") for length in lengths])
    return lengths if torch.equal(counted, positions_N.long()) else None


def join_records(samples: Sequence[Sample], lengths: Sequence[int], layout: RoutingLayout) -> Tensor:
    """(1, N, L, K) packed ids of sequences in one row; the last token of a sample has no row and is missing."""
    size = (sum(lengths), len(layout.moe_layers), layout.top_k)
    joined = torch.full(size, layout.missing, dtype=layout.storage_dtype, device="cpu")
    for sample, length, first in zip(samples, lengths, first_rows(lengths), strict=True):
        rows = sample.record[:length]
        joined[first : first + len(rows)] = rows
    return joined[None]


def first_rows(lengths: Sequence[int]) -> list[int]:
    """Where each sequence begins."""
    return list(accumulate(lengths, initial=0))[:-1]


def check_sequences(samples: Sequence[Sample], lengths: Sequence[int], tokens: Tensor | None) -> None:
    """
    Refuse to replay records on other tokens than those they were made for.

    Args:
        samples (sequence of [`Sample`]):
            One a sequence.
        lengths (sequence of `int`):
            Tokens of each, the first of its sample.
        tokens (`torch.Tensor` of shape `(1, N)`, *optional*):
            Input ids of the forward, where it has any.

    Raises:
        [`MisalignedRecordError`]: Naming the first sample, and both numbers or tokens.
    """
    long = next((i for i, sample in enumerate(samples) if lengths[i] > len(sample.tokens)), None)
    if long is not None:
        raise MisalignedRecordError(
            f"sample {samples[long].identity}: its sequence in a forward without padding has {lengths[long]} tokens, "
            f"but it was rolled out with {len(samples[long].tokens)}. Keep the order of `rollout_samples` in the row, "
            "and begin the positions of each sample at 0."
        )
    if tokens is None:
        return
    expected = torch.cat([sample.tokens[:length] for sample, length in zip(samples, lengths, strict=True)])
    wrong = expected.to(tokens.device) != tokens[0]
    if bool(wrong.any()):  # one wait for the device, before anything is computed from the wrong experts
        at = int(wrong.nonzero()[0])
        row = max(i for i, first in enumerate(first_rows(lengths)) if first <= at)
        raise MisalignedRecordError(
            f"sample {samples[row].identity}: {int(wrong.sum())} tokens of a forward without padding differ from "
            f"those that its records were made for, the first at position {at - first_rows(lengths)[row]}: "
            f"{int(tokens[0, at])} instead of {int(expected[at])}. Keep the order of `rollout_samples` in the row, "
            "and the tokens as they are."
        )


def recorded_rows(
    forwards: Sequence[Tensor],
    positions: Sequence[Any],
    samples: Sequence[Sample],
    prompt_width: int,
    layout: RoutingLayout,
) -> list[Tensor]:
    """
    The rows of each sample among forwards that recorded, padded or not.

    Args:
        forwards (sequence of `torch.Tensor` of shape `(B, T, L, K)`):
            Packed ids.
        positions (sequence of `torch.Tensor`, *optional* each):
            Position ids that each forward was given.
        samples (sequence of [`Sample`]):
            All of them, in order.
        prompt_width (`int`):
            Width of the padded prompts.
        layout ([`RoutingLayout`]):
            Layers and experts of the model.

    Returns:
        list of `torch.Tensor` of shape `(T_i - 1, L, K)`: Missing where a sequence was cut.
    """
    records: list[Tensor] = []
    for forward, position_ids in zip(forwards, positions, strict=True):
        lengths = sequence_lengths(position_ids, *forward.shape[:2])
        some = samples[len(records) : len(records) + (len(forward) if lengths is None else len(lengths))]
        if lengths is None:
            sizes = [sample.prompt_length for sample in some], [sample.completion_length for sample in some]
            records += slice_samples(forward.cpu(), prompt_width, *sizes)
            continue
        for sample, rows in zip(some, forward[0].cpu().split(lengths), strict=True):
            whole = rows.new_full((len(sample.tokens) - 1, *rows.shape[1:]), layout.missing)
            whole[: len(rows)] = rows[: len(whole)]
            records.append(whole)
    return records
