"""From the turns of a rollout to one record a sample.

Legend: T tokens of a sequence (P prompt + C completion), L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..records.checks import check_length, check_rows
from ..records.layout import RoutingLayout
from ..records.sampling_masks import SamplingMask
from ..records.storage import missing_rows


@dataclass
class Turn:
    """
    One call of the rollout engine.

    Args:
        prompt_ids, completion_ids (list of `list[int]`):
            Tokens it was given, and tokens it sampled.
        records (list of `torch.Tensor` of shape `(P_i + C_i - 1, L, K)`):
            Packed ids of each of its sequences; empty where no routes are recorded.
        logprobs (list of `torch.Tensor` of shape `(C_i,)`, *optional*):
            Log-probabilities that it sampled with.
        masks (list of [`SamplingMask`], *optional*):
            What its sampler kept, one row a sampled token.
    """

    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    records: Sequence[Tensor]
    logprobs: Sequence[Tensor] | None = None
    masks: Sequence[SamplingMask] | None = None


@dataclass
class RolloutRecord:
    """What the rollout of a batch leaves for training: one entry a sample, no padding."""

    prompt_lengths: list[int]
    records: list[Tensor]  # packed (T_i - 1, L, K)
    logprobs: list[Tensor] | None  # (C_i,)
    masks: list[SamplingMask] | None = None  # C_i rows

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
    layout: RoutingLayout | None,
) -> RolloutRecord:
    """
    Join the turns of each sample.

    A later turn is given the whole conversation again, and what it prefills was already routed once. The earliest turn
    that fed a token wins, because its routing gave the sampled log-probabilities; later turns fill the positions that
    are new: the last token of the turn before, what a tool said, and what they sampled.

    Which sample a turn continues is told by tokens. Where they fit several samples, one that still lacks what the turn
    has goes first, and the entries of a turn keep the order of the samples.

    Args:
        turns (sequence of [`Turn`]):
            In the order they were made: each with all samples that went on, or the samples one after the other.
        prompt_ids, completion_ids (sequence of `list[int]`):
            What the trainer scores: completions hold all turns and tool results, and may be truncated.
        layout ([`RoutingLayout`], *optional*):
            Layers and experts of the model; `None` where no routes are recorded.

    Returns:
        [`RolloutRecord`]: Rows that no turn fed are missing, and what no turn sampled is unrestricted.

    Raises:
        `ValueError`: If a record does not belong to its tokens, or cannot be one of this model; it names the sample.
    """
    stitched = [_Stitched(p, c, layout) for p, c in zip(prompt_ids, completion_ids, strict=True)]
    for turn in turns:
        for entry, sample in enumerate(_samples_of(turn, stitched)):
            if layout is not None:
                fed = len(turn.prompt_ids[entry]) + len(turn.completion_ids[entry])
                check_length(turn.records[entry].shape[0], fed, sample)
                check_rows(turn.records[entry], layout, sample=sample)
            if turn.masks is not None:
                turn.masks[entry].check(turn.completion_ids[entry], sample)
            stitched[sample].add(turn, entry)
    logprobs = masks = None
    if turns and all(turn.logprobs is not None for turn in turns):
        logprobs = [joined.logprobs[len(joined.prompt) :] for joined in stitched]
    if turns and all(turn.masks is not None for turn in turns):
        masks = [joined.mask for joined in stitched]
    prompt_lengths, records = [len(joined.prompt) for joined in stitched], [joined.record for joined in stitched]
    return RolloutRecord(prompt_lengths, records, logprobs, masks)


class _Stitched:
    """The record of one sample while its turns are joined."""

    def __init__(self, prompt: Sequence[int], completion: Sequence[int], layout: RoutingLayout | None):
        self.layout = layout
        self.prompt = prompt
        self.ids = [*prompt, *completion]
        self.bytes = _as_bytes(self.ids)
        self.num_rows = max(len(self.ids) - 1, 0)
        self.logprobs = torch.full((len(self.ids),), float("nan"))
        self.filled = 0  # rows
        self.fed: int | None = None  # tokens up to the end of its longest turn
        self._pieces: list[Tensor] = []
        self._masks: dict[int, SamplingMask] = {}  # by position of the first token

    def goes_on_at(self, first: int) -> bool:
        """Whether a prompt of so many tokens is the one of the sample, or all of the turns before and maybe more."""
        return first == len(self.prompt) if self.fed is None else first >= self.fed

    def lacks(self, turn: Turn, entry: int) -> bool:
        """Whether an entry of the same tokens would add to the sample."""
        first = len(turn.prompt_ids[entry])
        end = first + len(turn.completion_ids[entry])
        if min(end - 1, self.num_rows) > self.filled:
            return True
        return turn.logprobs is not None and bool(self.logprobs[max(first, len(self.prompt)) : end].isnan().any())

    def add(self, turn: Turn, entry: int) -> None:
        """Take the rows that are new, as far as the tokens agree."""
        fed = [*turn.prompt_ids[entry], *turn.completion_ids[entry]]
        agreed = _common_prefix(fed, self.ids)
        end = min(agreed, len(fed) - 1, self.num_rows)  # a T-th row was never routed
        self.fed = max(len(fed), self.fed or 0)
        if end > self.filled:
            if self.layout is not None:
                self._pieces.append(turn.records[entry][self.filled : end])
            self.filled = end
        first = len(turn.prompt_ids[entry])
        if turn.logprobs is not None:
            sampled = turn.logprobs[entry][: max(agreed - first, 0)]
            self.logprobs[first : first + len(sampled)] = sampled
        if turn.masks is not None and agreed > first:
            self._masks[first] = turn.masks[entry][: agreed - first]

    @property
    def record(self) -> Tensor:
        """(T - 1, L, K); a sample of one turn is not copied."""
        if self.layout is None:
            return torch.empty(0)
        if self.filled == self.num_rows and len(self._pieces) == 1:
            return self._pieces[0]
        size = (self.num_rows - self.filled, len(self.layout.moe_layers), self.layout.top_k)
        rest = torch.full(size, self.layout.missing, dtype=self.layout.storage_dtype)
        return torch.cat([*self._pieces, rest])

    @property
    def mask(self) -> SamplingMask:
        """One row a token of the completion."""
        pieces, at = [], len(self.prompt)
        for first, piece in sorted(self._masks.items()):
            pieces += [SamplingMask.unrestricted(max(first - at, 0)), piece[max(at - first, 0) :]]
            at = max(at, first + len(piece))
        return SamplingMask.join([*pieces, SamplingMask.unrestricted(len(self.ids) - at)])


def _samples_of(turn: Turn, samples: Sequence[_Stitched]) -> list[int]:
    """
    The sample that each entry of a turn continues, no two the same: the whole turn at the lowest price.

    Whatever begins with the prompt of an entry may be continued by it. Most of all, the tokens should be the same as
    far as both go; then the sample should be about to go on there, lack what the entry has and, in a turn of all
    samples, have its index. Of what is still equal, the first entry takes the first sample.
    """
    entries = len(turn.records if turn.masks is None else turn.masks)  # none in evaluation
    in_order = entries == len(samples)
    prices: list[dict[int, int]] = []  # by entry: sample, price
    prompts = [_as_bytes(ids) for ids in turn.prompt_ids]
    shortest = min(map(len, prompts), default=0)
    alike: dict[bytes, list[int]] = {}  # samples by their beginning, so that not each is compared with each
    for sample, joined in enumerate(samples):
        alike.setdefault(joined.bytes[:shortest], []).append(sample)
    for entry, prompt in enumerate(prompts):
        price: dict[int, int] = {}
        fed = prompt + _as_bytes(turn.completion_ids[entry])
        for sample in alike.get(prompt[:shortest], ()):
            joined = samples[sample]
            if joined.bytes.startswith(prompt):
                agrees = joined.bytes.startswith(fed) or fed.startswith(joined.bytes)
                goes_on = joined.goes_on_at(len(turn.prompt_ids[entry]))
                lacks = agrees and joined.lacks(turn, entry)
                price[sample] = 0
                # no sum over the entries of what comes later outweighs one of what comes before
                for fault in (not agrees, not goes_on, not lacks, in_order and sample != entry):
                    price[sample] = price[sample] * (entries + 1) + fault
        prices.append(price)
    chosen = _cheapest(prices)
    for entry in range(entries):
        if entry not in chosen:
            others = f", but for {len(prices[entry])} that its other entries continue" if prices[entry] else ""
            raise ValueError(
                f"a turn was given a prompt of {len(turn.prompt_ids[entry])} tokens that is the beginning of none of "
                f"the {len(samples)} sequences{others}, so its routes belong to no sample. Do not re-tokenize between "
                "turns."
            )
    return [chosen[entry] for entry in range(entries)]


def _cheapest(prices: Sequence[dict[int, int]]) -> dict[int, int]:
    """
    Match as many entries as can be to different samples, at the lowest sum of prices.

    Entry by entry, along the cheapest path on which entries before it move on to another sample.
    """
    chosen: dict[int, int] = {}
    owner: dict[int, int] = {}
    for entry in range(len(prices)):
        paid: dict[int, int] = {}  # by sample that a path reaches
        via: dict[int, int] = {}  # the entry that would take it
        lowest = min(prices[entry].values(), default=0)
        paths = [(entry, 0)]
        for at, so_far in paths:  # grows
            for sample, price in prices[at].items():
                if sample not in paid or so_far + price < paid[sample]:
                    paid[sample], via[sample] = so_far + price, at
                    if sample in owner:
                        paths.append((owner[sample], paid[sample] - prices[owner[sample]][sample]))
            free = [sample for sample in paid if sample not in owner]
            if any(paid[sample] == lowest for sample in free):  # no path is cheaper than the entry alone
                break
        taken = min(free, key=lambda sample: (paid[sample], sample)) if free else None
        while taken is not None:
            mover = via[taken]
            left = chosen.get(mover)
            chosen[mover], owner[taken] = taken, mover
            taken = left
    return chosen


def _as_bytes(ids: Sequence[int]) -> bytes:
    """Eight bytes a token: whether one sequence begins another is told without copying either."""
    return np.asarray(ids, dtype=np.int64).tobytes()


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    shorter = min(len(one), len(other))
    if list(one[:shorter]) == list(other[:shorter]):
        return shorter
    return next(position for position in range(shorter) if one[position] != other[position])
