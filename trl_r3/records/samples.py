"""The samples of a rollout with what was recorded of them, and the batches of them that are scored.

Legend: B batch, T tokens of a sequence (P prompt + C completion), L MoE layers, K experts per token, M observed rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .._compat import edits
from .checks import MisalignedRecordError
from .metrics import expert_load
from .real_tokens import RealTokens
from .record import RoutingLayout, align, lay_out, missing_rows
from .sampling_mask import SamplingMask
from .unpadded_rows import check_sequences, first_rows, join_records

BYTES_OF_TOKEN = 8  # by [`token_bytes`]
_OBSERVED_PAIRS = 256  # (row, layer) pairs of a sample whose live selection is looked at: enough to judge it by itself
_OBSERVED_ROWS = 8  # rows of a sample at least


@dataclass
class Observation:
    """
    Live and recorded selections at some rows of a batch, all on the host.

    Args:
        sample (`torch.Tensor` of shape `(M,)`, `torch.int64`):
            The sample that a row belongs to, not negative. Samples of different rollouts that are pooled need
            different numbers.
        live (`torch.Tensor` of shape `(M, L, K)`):
            Ids that the model selects at the weights of the rollout.
        recorded (`torch.Tensor` of shape `(M, L, K)`):
            Ids of the record. The rows are not missing.
        before, after (`torch.Tensor` of shape `(M, L, K)`):
            Ids of the record one token earlier and one later in the same sample.
    """

    sample: Tensor
    live: Tensor
    recorded: Tensor
    before: Tensor
    after: Tensor

    def of(self, numbers: Iterable[int]) -> Observation:
        """The rows of some samples, told by their numbers."""
        rows = torch.isin(self.sample, torch.tensor(list(numbers), device="cpu"))
        parts = (self.sample, self.live, self.recorded, self.before, self.after)
        return Observation(*(part[rows] for part in parts))


@dataclass
class Sample:
    """
    One sequence of a rollout.

    Args:
        identity (`int`):
            What names it in the batches that it is part of, and in errors.
        tokens (`torch.Tensor` of shape `(T,)`):
            Its tokens, which the record was made for.
        prompt_length (`int`):
            Number of its prompt tokens.
        record (`torch.Tensor` of shape `(T - 1, L, K)`):
            Packed ids; of no rows where only sampling masks are recorded.
        rows_that_matter (`int`, *optional*):
            How many rows, from the first on, the loss depends on. All by default.
        mask ([`SamplingMask`], *optional*):
            What truncated sampling kept, one row a completion token.
        logprobs (`torch.Tensor` of shape `(C,)`, *optional*):
            Log-probabilities that its completion was sampled with, where this package knows them.
        step (`int`, *optional*, defaults to `0`):
            Optimizer steps that had been taken when it was sampled.
        log_scores (`torch.Tensor` of shape `(C, L, K)`, *optional*):
            What the old policy's routers gave the recorded experts, at the rows that predict its completion.
    """

    identity: int
    tokens: Tensor
    prompt_length: int
    record: Tensor
    rows_that_matter: int | None = None
    mask: SamplingMask | None = None
    logprobs: Tensor | None = None
    step: int = 0
    log_scores: Tensor | None = None

    @property
    def completion_length(self) -> int:
        """Number of its completion tokens."""
        return len(self.tokens) - self.prompt_length

    def count_rows(self, layout: RoutingLayout) -> tuple[int, int]:
        """Number of rows that the loss depends on, and how many of these have no record."""
        rows = self.record.numpy()[: self.rows_that_matter]
        return rows.shape[0], int(np.count_nonzero(rows[:, 0, 0] == layout.missing))

    def expert_load(self, layout: RoutingLayout) -> Tensor:
        """(L, E): how often each expert is selected in the rows that the loss depends on."""
        rows = self.record[: self.rows_that_matter]
        missing = missing_rows(rows, layout)
        return expert_load(rows[~missing] if missing.any() else rows, layout.num_experts)  # a copy takes as long

    def observed_rows(self, layout: RoutingLayout) -> Tensor:
        """
        Rows to look at, spread evenly over those that the loss depends on and whose neighbours are recorded, too. Of
        the others training may see less than the rollout: TRL masks completions that were cut.
        """
        whole = ~missing_rows(self.record[: self.rows_that_matter], layout)
        inner = (whole[:-2] & whole[1:-1] & whole[2:]).nonzero()[:, 0] + 1
        count = max(_OBSERVED_ROWS, -(-_OBSERVED_PAIRS // len(layout.moe_layers)))
        if len(inner) <= count:
            return inner
        return inner[torch.linspace(0, len(inner) - 1, count, dtype=torch.float32, device="cpu").round().long()]


def token_bytes(ids: Sequence[int]) -> bytes:
    """Tokens as bytes: whether one sequence begins another is told without copying either."""
    return np.asarray(ids, dtype=np.int64).tobytes()


class CheckedTokens:
    """
    The tokens of a batch, held once against those that its samples were recorded for.

    Args:
        samples (sequence of [`Sample`]):
            B samples, in the order of the batch.
        input_ids (`torch.Tensor` of shape `(B, T)`):
            Prompts padded on the left and completions on the right.
        prompt_width (`int`):
            Width of the padded prompts.
        mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            Which tokens are real: read with what tells whether tokens are equal, so that it costs no wait.

    Raises:
        [`MisalignedRecordError`]: Naming the first sample and position, and both tokens.
    """

    def __init__(self, samples: Sequence[Sample], input_ids: Tensor, prompt_width: int, mask: Tensor | None = None):
        if input_ids.shape[0] != len(samples):
            raise MisalignedRecordError(
                f"{input_ids.shape[0]} sequences are scored with the records of {len(samples)} samples. Score the "
                "whole batch in one call, with `rollout_samples` indexed as its other tensors are, and what is not of "
                "the rollout inside `with trainer.live_routing():`."
            )
        self.samples, self.prompt_width = samples, prompt_width
        self._input_ids, self._version = input_ids, edits(input_ids)
        self.real = check_tokens(samples, input_ids, prompt_width, mask)

    def check(self, first: int, input_ids: Tensor) -> None:
        """Of a forward over the samples from `first` on: compared only where it is no slice of the batch itself."""
        part = self._input_ids[first : first + input_ids.shape[0]]
        is_same = (part.data_ptr(), part.shape, part.stride()) == (
            input_ids.data_ptr(),
            input_ids.shape,
            input_ids.stride(),
        )
        if not is_same or edits(self._input_ids) != self._version:
            check_tokens(self.samples[first : first + len(input_ids)], input_ids, self.prompt_width)


def check_tokens(
    samples: Sequence[Sample], input_ids: Tensor, prompt_width: int, mask: Tensor | None = None
) -> RealTokens | None:
    """
    Refuse to replay records on other tokens than those they were made for.

    Args:
        samples, input_ids, prompt_width, mask:
            As in [`CheckedTokens`].

    Returns:
        [`RealTokens`], *optional*: What the mask says, if there is one.

    Raises:
        [`MisalignedRecordError`]: Naming the first sample and position, and both tokens.
    """
    expected = torch.empty(tuple(input_ids.shape), dtype=torch.int64, device="cpu")
    prompts, width = [sample.prompt_length for sample in samples], input_ids.shape[1]
    there = [s.tokens[: max(width - prompt_width + s.prompt_length, 0)] for s in samples]
    lay_out(there, prompts, prompt_width, expected, fill=-1)
    expected = expected.to(input_ids.device)
    wrong = (expected != input_ids) & (expected >= 0)
    real_BT = wrong[:0] if mask is None else mask.detach().bool()
    # one wait for the device, before anything is computed from the wrong experts
    seen = torch.cat([wrong.any()[None], real_BT.flatten()]).cpu()
    if bool(seen[0]):
        row, position = wrong.nonzero()[0].tolist()
        raise MisalignedRecordError(
            f"sample {samples[row].identity}: {int(wrong[row].sum())} tokens of the batch differ from those that its "
            f"record was made for, the first at position {position}: {int(input_ids[row, position])} instead of "
            f"{int(expected[row, position])}. Whatever reorders or edits the batch has to index `rollout_samples` "
            "with its other tensors, and to leave the tokens as they are. What is not of the rollout is scored inside "
            "`with trainer.live_routing():`."
        )
    return None if mask is None else RealTokens(mask, seen[1:].view(mask.shape))


@dataclass
class ScoredBatch:
    """
    The records of a batch that one or several forwards score, a slice of its samples each.

    Args:
        samples (sequence of [`Sample`]):
            In the order of the batch.
        prompt_width (`int`):
            Width of the padded prompts.
        layout ([`RoutingLayout`]):
            Layers and experts of the model.
        observes (`bool`, *optional*, defaults to `False`):
            Whether to look at the live selection of some rows.
        checked ([`CheckedTokens`], *optional*):
            The tokens of the batch. Without it, those of each forward are compared, and its mask is read.
    """

    samples: Sequence[Sample]
    prompt_width: int
    layout: RoutingLayout
    observes: bool = False
    checked: CheckedTokens | None = None
    scored: int = field(default=0, init=False)
    rows: int = field(default=0, init=False)  # handed out, of those that matter
    rows_missing: int = field(default=0, init=False)  # of these, without a record
    observed: Tensor | None = field(default=None, init=False)
    observations: list[Observation] = field(default_factory=list, init=False)
    _chosen: list[tuple[Sample, Tensor]] = field(default_factory=list, init=False)

    def take(self, batch_size: int, num_tokens: int, tokens: Tensor | None = None) -> Tensor:
        """Packed ids of shape `(B, T, L, K)` of the next `batch_size` samples: only these go to the device."""
        first, samples = self.scored, self._next(batch_size)
        if tokens is not None and self.checked is not None:
            self.checked.check(first, tokens)
        elif tokens is not None:
            check_tokens(samples, tokens, self.prompt_width)
        prompts = [each.prompt_length for each in samples]
        self._choose_rows(samples, [i * num_tokens + self.prompt_width - each for i, each in enumerate(prompts)])
        return align([each.record for each in samples], prompts, self.prompt_width, num_tokens, self.layout)

    def take_packed(self, lengths: Sequence[int], tokens: Tensor | None = None) -> Tensor:
        """Packed ids of shape `(1, N, L, K)` of the next samples, which a row holds one after the other."""
        if len(lengths) == 1 and lengths[0] > len(self.samples[self.scored].tokens):  # it is padded, and counted
            return self.take(1, lengths[0], tokens)
        samples = self._next(len(lengths))
        check_sequences(samples, lengths, tokens)
        self._choose_rows(samples, first_rows(lengths))
        return join_records(samples, lengths, self.layout)

    def _next(self, count: int) -> Sequence[Sample]:
        first, last = self.scored, self.scored + count
        if last > len(self.samples):
            raise RuntimeError(
                f"a forward scores samples {first} to {last - 1}, but the batch has {len(self.samples)}. Replay "
                "expects every sample to be scored once, in order."
            )
        self.scored = last
        for sample in self.samples[first:last]:
            rows, missing = sample.count_rows(self.layout)
            self.rows, self.rows_missing = self.rows + rows, self.rows_missing + missing
        return self.samples[first:last]

    def _choose_rows(self, samples: Sequence[Sample], first_rows: Sequence[int]) -> None:
        if not self.observes:
            return
        self._chosen = [(sample, sample.observed_rows(self.layout)) for sample in samples]
        observed = torch.cat([first + rows for first, (_, rows) in zip(first_rows, self._chosen, strict=True)])
        self.observed = observed if len(observed) else None

    def observe(self, live_MLK: Tensor) -> None:
        """Take the live selection of the rows of `observed`."""
        of_samples = torch.cat([rows.new_full(rows.shape, sample.identity) for sample, rows in self._chosen])
        around = (torch.cat([sample.record[rows + step] for sample, rows in self._chosen]) for step in (0, -1, 1))
        recorded_MLK, before_MLK, after_MLK = around
        self.observations.append(Observation(of_samples, live_MLK, recorded_MLK, before_MLK, after_MLK))

    def real(self, mask: Tensor) -> Tensor:
        """What the attention mask of a forward says, on the host."""
        known = None if self.checked is None else self.checked.real
        return (known or RealTokens()).of(mask)

    def check_done(self) -> None:
        """Refuse a pass that left samples out."""
        if self.scored != len(self.samples):
            raise RuntimeError(
                f"{self.scored} of {len(self.samples)} samples were scored with their record. Replay expects every "
                "sample to be scored once, in order."
            )
