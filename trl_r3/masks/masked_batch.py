"""The sampling masks of the batches that are scored.

Legend: B batch, T tokens of a padded sequence, R rows that are scored, M kept ids of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..records.samples import CheckedTokens, Sample, check_tokens
from ..records.sampling_mask import SamplingMask


@dataclass
class KeptRows:
    """
    The rows of a forward that are scored, those with the fewest kept ids first and unrestricted ones last.

    Args:
        rows (`torch.Tensor` of shape `(R,)`):
            Which position of the flat `(B, T - 1)` predictions each is.
        counts (`torch.Tensor` of shape `(R,)`):
            Its kept ids; 0 where the whole vocabulary is.
        ids (`torch.Tensor` of shape `(M,)` and dtype `torch.int32`):
            Ids of all rows, one row after the other.
    """

    rows: Tensor
    counts: Tensor
    ids: Tensor

    @classmethod
    def sorted(cls, rows: Tensor, mask: SamplingMask, chosen: Tensor) -> KeptRows:
        """Rows of the flat predictions, and the row of `mask` that belongs to each."""
        counts, starts = mask.counts[chosen], mask.offsets[chosen].long()
        order = torch.where(counts == 0, torch.iinfo(torch.int64).max, counts).argsort(stable=True)
        rows, counts, starts = rows[order], counts[order], starts[order]
        shifts = starts - (counts.cumsum(0) - counts)
        take = torch.arange(int(counts.sum()), device="cpu") + torch.repeat_interleave(shifts, counts)
        return cls(rows, counts, mask.ids[take])


@dataclass
class MaskedBatch:
    """
    The sampling masks of a batch that one or several forwards score, a slice of its samples each.

    Args:
        samples (sequence of [`Sample`]):
            In the order of the batch, each with its mask.
        prompt_width (`int`):
            Width of the padded prompts.
        checked ([`CheckedTokens`], *optional*):
            The tokens of the batch. Without it, those of each forward are compared.
    """

    samples: Sequence[Sample]
    prompt_width: int
    checked: CheckedTokens | None = None
    scored: int = field(default=0, init=False)

    def take(self, input_ids: Tensor, scored: Tensor) -> KeptRows:
        """
        Rows of the next samples.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`):
                Input ids of the forward.
            scored (`torch.BoolTensor` of shape `(B, T - 1)`):
                Which predictions are scored.
        """
        first, last = self.scored, self.scored + input_ids.shape[0]
        if last > len(self.samples):
            raise RuntimeError(
                f"a forward scores samples {first} to {last - 1}, but the batch has {len(self.samples)}. Sampling "
                "masks expect every sample to be scored once, in order."
            )
        self.scored, samples = last, self.samples[first:last]
        if self.checked is not None:
            self.checked.check(first, input_ids)
        else:
            check_tokens(samples, input_ids, self.prompt_width)
        masks = [sample.mask for sample in samples if sample.mask is not None]
        lengths = torch.tensor([len(mask) for mask in masks], device="cpu")
        rows = scored.cpu().flatten().nonzero()[:, 0]
        sample, position = rows // scored.shape[1], rows % scored.shape[1] - (self.prompt_width - 1)
        if bool(((position < 0) | (position >= lengths[sample])).any()):
            raise RuntimeError(
                "the forward scores positions that are no sampled tokens of their samples. Score the completions of "
                "the batch as `_generate_and_score_completions` returned them."
            )
        return KeptRows.sorted(rows, SamplingMask.join(masks), (lengths.cumsum(0) - lengths)[sample] + position)

    def check_done(self) -> None:
        """Refuse a pass that left samples out."""
        if self.scored != len(self.samples):
            raise RuntimeError(
                f"{self.scored} of {len(self.samples)} samples were scored over what their sampling masks keep. Masks "
                "expect every sample to be scored once, in order, through the head that TRL adds to the model."
            )
