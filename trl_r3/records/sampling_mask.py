"""Sampling masks: which tokens truncated sampling left to draw from.

Legend: C tokens of a completion, M kept ids of all of them, D draws, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingMask:
    """
    The kept token ids of each sampled token, in compressed rows: 4 bytes an id and 4 a token, on the host.

    A row without ids is unrestricted: nothing was cut there, or no sampler drew the token (what a tool said).

    Args:
        ids (`torch.Tensor` of shape `(M,)` and dtype `torch.int32`):
            Ids of all rows, one row after the other.
        offsets (`torch.Tensor` of shape `(C + 1,)` and dtype `torch.int32`):
            Row c is `ids[offsets[c] : offsets[c + 1]]`.
    """

    ids: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int] | np.ndarray | Tensor]) -> SamplingMask:
        """
        Compress one row a token.

        Raises:
            `ValueError`: If a row has more than one dimension or is not of integers.
        """
        tensors = []
        for position, row in enumerate(rows):
            ids = torch.as_tensor(row, device="cpu") if len(row) else torch.empty(0, dtype=torch.int32, device="cpu")
            if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
                raise ValueError(
                    f"the kept ids of token {position} are {ids.dtype} of shape {tuple(ids.shape)}, expected integers "
                    "in one dimension. Pass one list of token ids a token."
                )
            tensors.append(ids.to(torch.int32))
        counts = torch.tensor([0, *map(len, tensors)], device="cpu")
        ids = torch.cat(tensors) if tensors else torch.empty(0, dtype=torch.int32, device="cpu")
        return cls(ids, counts.cumsum(0).int())

    @classmethod
    def unrestricted(cls, count: int) -> SamplingMask:
        """So many rows without ids."""
        offsets = torch.zeros(count + 1, dtype=torch.int32, device="cpu")
        return cls(offsets[:0], offsets)

    @classmethod
    def join(cls, masks: Sequence[SamplingMask]) -> SamplingMask:
        """One after the other."""
        counts = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), *(mask.counts for mask in masks)])
        ids = torch.cat([torch.empty(0, dtype=torch.int32, device="cpu"), *(mask.ids for mask in masks)])
        return cls(ids, counts.cumsum(0).int())

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: slice) -> SamplingMask:
        """A run of rows."""
        first, last, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"every {step}th row of a sampling mask was asked for, but only runs can be. Slice by 1.")
        offsets = self.offsets[first : max(first, last) + 1]
        return SamplingMask(self.ids[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])

    @property
    def counts(self) -> Tensor:
        """(C,) ids of each row."""
        return self.offsets.diff().long()

    @property
    def nbytes(self) -> int:
        """Bytes in host memory."""
        return self.ids.nbytes + self.offsets.nbytes

    def check(self, tokens: Sequence[int], sample: int) -> None:
        """
        Refuse rows that cannot be those of their tokens: what was drawn was kept.

        Args:
            tokens (sequence of `int`):
                The C tokens.
            sample (`int`):
                Index that errors name.

        Raises:
            `ValueError`: Naming the sample, the position in the completion and the token.
        """
        if len(tokens) != len(self):
            raise ValueError(
                f"sample {sample}: its sampling mask has {len(self)} rows, but {len(tokens)} tokens were sampled. "
                "Return one row of kept ids a token of the completion."
            )
        row = torch.repeat_interleave(torch.arange(len(self), device="cpu"), self.counts)
        drawn = torch.as_tensor(tokens, device="cpu")[row] == self.ids
        lacking = (self.counts > 0) & (torch.bincount(row[drawn], minlength=len(self)) == 0)
        if lacking.any():
            position = int(lacking.nonzero()[0])
            raise ValueError(
                f"sample {sample}: token {tokens[position]} was sampled at position {position} of the completion, but "
                f"is not among the {int(self.counts[position])} ids that its sampling mask keeps there. The mask "
                "belongs to other tokens, or was made before the last logits processor."
            )


def kept_rows(scores_DV: Tensor) -> list[Tensor]:
    """
    The ids of each row that can be drawn, `torch.int32` on the host.

    Args:
        scores_DV (`torch.Tensor` of shape `(D, V)`):
            Scores that a sampler draws from; what it may not draw has -inf.

    Returns:
        list of `torch.Tensor`: D of them, empty where nothing was cut.
    """
    kept_DV = scores_DV > -torch.inf
    counts_D = kept_DV.sum(1)
    whole_D = counts_D == scores_DV.shape[1]
    ids = (kept_DV & ~whole_D[:, None]).nonzero()[:, 1].int().cpu()
    return list(ids.split(counts_D.masked_fill(whole_D, 0).tolist()))
