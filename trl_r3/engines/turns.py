"""What one call of an engine leaves, and how the calls of a rollout are joined to one record a sample.

Legend: T tokens of a sequence (P prompt + C completion), L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..records.checks import check_length, check_rows
from ..records.record import RoutingLayout
from ..records.samples import token_bytes
from ..records.sampling_mask import SamplingMask
from .matching import match_samples

Prompts = Sequence[Sequence[int]]


class SamplingTrainer(Protocol):
    """What an engine asks of the trainer that samples with it."""

    accelerator: Any
    model_wrapped: Any
    temperature: float
    use_vllm: bool
    vllm_mode: str
    vllm_generation: Any
    use_transformers_continuous_batching: bool


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

    prompt_ids: Prompts
    completion_ids: Prompts
    records: Sequence[Tensor]
    logprobs: Sequence[Tensor] | None = None
    masks: Sequence[SamplingMask] | None = None

    @property
    def entries(self) -> int:
        """Of how many sequences something was recorded; of none in evaluation."""
        return max(len(part or ()) for part in (self.records, self.logprobs, self.masks))


MakeTurn = Callable[[Prompts, Prompts], Turn]  # from prompts and completions, after the call


@dataclass
class RolloutRecord:
    """What the rollout of a batch leaves for training: one entry a sample, no padding."""

    prompt_lengths: list[int]
    records: list[Tensor]  # packed (T_i - 1, L, K)
    logprobs: list[Tensor] | None  # (C_i,)
    masks: list[SamplingMask] | None = None  # C_i rows


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
            What the trainer scores: completions hold all turns and tool results, and may be truncated, in whichever
            turn.
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
            if layout is not None and turn.records:
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
        self.bytes = token_bytes(self.ids)
        self.num_rows = max(len(self.ids) - 1, 0)
        self.logprobs = torch.full((len(self.ids),), float("nan"), dtype=torch.float32, device="cpu")
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
        agreed = common_prefix(fed, self.ids)
        end = min(agreed, len(fed) - 1, self.num_rows)  # a T-th row was never routed
        self.fed = max(len(fed), self.fed or 0)
        if end > self.filled:
            if self.layout is not None:
                rows = turn.records[entry] if turn.records else self._no_rows(len(fed) - 1)
                self._pieces.append(rows[self.filled : end])
            self.filled = end
        first = len(turn.prompt_ids[entry])
        if turn.logprobs is not None:
            sampled = turn.logprobs[entry][: max(agreed - first, 0)]
            self.logprobs[first : first + len(sampled)] = sampled
        if turn.masks is not None and agreed > first:
            self._masks[first] = turn.masks[entry][: agreed - first]

    def price(self, turn: Turn, entry: int, fed: bytes) -> tuple[bool, bool, bool, bool]:
        """
        What speaks against an entry of a turn whose prompt is the beginning of the sample, or begins with all of it,
        the gravest first: its tokens (`fed`) differ from those of the sample, the sample ends before and is whole, it
        is not about to go on there, it lacks nothing of the entry.
        """
        agrees = self.bytes.startswith(fed) or fed.startswith(self.bytes)
        first, adds = len(turn.prompt_ids[entry]), agrees and self.lacks(turn, entry)
        goes_on = self.goes_on_at(first)
        return not agrees, first > len(self.ids) and not (goes_on and adds), not goes_on, not adds

    @property
    def record(self) -> Tensor:
        """(T - 1, L, K); a sample of one turn is not copied."""
        if self.layout is None:
            return torch.empty(0, device="cpu")
        if self.filled == self.num_rows and len(self._pieces) == 1:
            return self._pieces[0]
        return torch.cat([*self._pieces, self._no_rows(self.num_rows - self.filled)])

    def _no_rows(self, count: int) -> Tensor:
        assert self.layout is not None  # or there are no records
        size = (count, len(self.layout.moe_layers), self.layout.top_k)
        return torch.full(size, self.layout.missing, dtype=self.layout.storage_dtype, device="cpu")

    @property
    def mask(self) -> SamplingMask:
        """One row a token of the completion."""
        pieces, at = [], len(self.prompt)
        for first, piece in sorted(self._masks.items()):
            pieces += [SamplingMask.unrestricted(max(first - at, 0)), piece[max(at - first, 0) :]]
            at = max(at, first + len(piece))
        return SamplingMask.join([*pieces, SamplingMask.unrestricted(len(self.ids) - at)])


def _samples_of(turn: Turn, samples: Sequence[_Stitched]) -> list[int]:
    """The sample that each entry of a turn continues, no two the same."""
    entries = turn.entries
    prompts = [token_bytes(ids) for ids in turn.prompt_ids]
    fed = [prompt + token_bytes(ids) for prompt, ids in zip(prompts, turn.completion_ids, strict=True)]

    def price(entry: int, sample: int) -> tuple[bool, ...]:
        return samples[sample].price(turn, entry, fed[entry])

    in_order = entries == len(samples)
    if in_order and all(
        samples[i].bytes.startswith(prompts[i]) and not any(price(i, i)) for i in range(entries)
    ):  # nothing speaks against it, as in all rollouts of one turn
        return list(range(entries))
    return match_samples(prompts[:entries], [sample.bytes for sample in samples], price, in_order)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    shorter = min(len(one), len(other))
    if list(one[:shorter]) == list(other[:shorter]):
        return shorter
    return next(position for position in range(shorter) if one[position] != other[position])
