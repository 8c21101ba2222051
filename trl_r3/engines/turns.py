"""From the turns of a rollout to one record a sample.

Legend: T tokens of a sequence (P prompt + C completion), L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..records.checks import check_length, check_rows
from ..records.layout import RoutingLayout
from ..records.storage import missing_rows


@dataclass
class Turn:
    """
    One call of the rollout engine.

    Args:
        prompt_ids, completion_ids (list of `list[int]`):
            Tokens it was given, and tokens it sampled.
        records (list of `torch.Tensor` of shape `(P_i + C_i - 1, L, K)`):
            Packed ids of each of its sequences.
        logprobs (list of `torch.Tensor` of shape `(C_i,)`, *optional*):
            Log-probabilities that it sampled with.
    """

    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    records: Sequence[Tensor]
    logprobs: Sequence[Tensor] | None = None


@dataclass
class RolloutRecord:
    """What the rollout of a batch leaves for training: one entry a sample, no padding."""

    prompt_lengths: list[int]
    records: list[Tensor]  # packed (T_i - 1, L, K)
    logprobs: list[Tensor] | None  # (C_i,)

    def missing_share(
        self, layout: RoutingLayout, rows_that_matter: Sequence[int] | None = None
    ) -> tuple[float, int | None]:
        """
        Share of rows without a record, and the first sample that has such a row.

        Args:
            layout ([`RoutingLayout`]):
                Layers and experts of the model.
            rows_that_matter (sequence of `int`, *optional*):
                How many rows of each sample, from its first on, count. All by default.
        """
        records: Sequence[Tensor] = self.records
        if rows_that_matter is not None:
            records = [record[:count] for record, count in zip(records, rows_that_matter, strict=True)]
        missing = [int(missing_rows(record, layout).sum()) for record in records]
        rows = sum(record.shape[0] for record in records)
        return sum(missing) / max(rows, 1), next((i for i, count in enumerate(missing) if count), None)


def stitch(
    turns: Sequence[Turn],
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    layout: RoutingLayout,
) -> RolloutRecord:
    """
    Join the turns of each sample.

    A later turn is given the whole conversation again, and what it prefills was already routed once. The earliest turn
    that fed a token wins, because its routing gave the sampled log-probabilities; later turns fill the positions that
    are new: the last token of the turn before, what a tool said, and what they sampled.

    Args:
        turns (sequence of [`Turn`]):
            In the order they were made. The first holds every sample, later ones those that went on, in order.
        prompt_ids, completion_ids (sequence of `list[int]`):
            What the trainer scores: completions hold all turns and tool results, and may be truncated.
        layout ([`RoutingLayout`]):
            Layers and experts of the model.

    Returns:
        [`RolloutRecord`]: Rows that no turn fed are missing.

    Raises:
        `ValueError`: If a record does not belong to its tokens, or cannot be one of this model; it names the sample.
    """
    sequences = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    stitched = [_Stitched(len(ids), layout) for ids in sequences]
    for number, turn in enumerate(turns):
        start = 0
        for entry, record in enumerate(turn.records):
            fed = [*turn.prompt_ids[entry], *turn.completion_ids[entry]]
            sample = entry if number == 0 else _sample_of(turn.prompt_ids[entry], sequences, start)
            start = sample + 1
            check_length(record.shape[0], len(fed), sample)
            check_rows(record, layout, sample=sample)
            stitched[sample].add(turn, entry, _common_prefix(fed, sequences[sample]))
    lengths = [len(prompt) for prompt in prompt_ids]
    logprobs = None
    if turns and all(turn.logprobs is not None for turn in turns):
        logprobs = [joined.logprobs[length:] for joined, length in zip(stitched, lengths, strict=True)]
    return RolloutRecord(lengths, [joined.record for joined in stitched], logprobs)


class _Stitched:
    """The record of one sample while its turns are joined."""

    def __init__(self, num_tokens: int, layout: RoutingLayout):
        self.layout = layout
        self.num_rows = max(num_tokens - 1, 0)
        self.logprobs = torch.full((num_tokens,), float("nan"))
        self.filled = 0
        self._pieces: list[Tensor] = []

    def add(self, turn: Turn, entry: int, agreed: int) -> None:
        """Take the rows that are new, as far as the tokens agree."""
        fed = len(turn.prompt_ids[entry]) + len(turn.completion_ids[entry]) - 1  # a T-th row was never routed
        end = min(agreed, fed, turn.records[entry].shape[0], self.num_rows)
        if end > self.filled:
            self._pieces.append(turn.records[entry][self.filled : end])
            self.filled = end
        if turn.logprobs is not None:
            first = len(turn.prompt_ids[entry])
            sampled = turn.logprobs[entry][: max(agreed - first, 0)]
            self.logprobs[first : first + len(sampled)] = sampled

    @property
    def record(self) -> Tensor:
        """(T - 1, L, K); a sample of one turn is not copied."""
        if self.filled == self.num_rows and len(self._pieces) == 1:
            return self._pieces[0]
        size = (self.num_rows - self.filled, len(self.layout.moe_layers), self.layout.top_k)
        rest = torch.full(size, self.layout.missing, dtype=self.layout.storage_dtype)
        return torch.cat([*self._pieces, rest])


def _sample_of(prompt: Sequence[int], sequences: list[list[int]], start: int) -> int:
    for sample in range(start, len(sequences)):
        if sequences[sample][: len(prompt)] == list(prompt):
            return sample
    raise ValueError(
        f"a turn was given a prompt of {len(prompt)} tokens that is the beginning of none of the "
        f"{len(sequences) - start} sequences from sample {start} on, so its routes belong to no sample. Do not "
        "re-tokenize between turns."
    )


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    shorter = min(len(one), len(other))
    if list(one[:shorter]) == list(other[:shorter]):
        return shorter
    return next(position for position in range(shorter) if one[position] != other[position])
