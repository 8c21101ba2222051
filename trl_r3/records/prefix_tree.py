"""Records of samples that are packed as a tree of prefixes: a token that samples share is forwarded once.

Legend: N forwarded tokens of a tree, T tokens of a sample, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .record import RoutingLayout

NO_VERSION = -1


@dataclass
class TreeSample:
    """
    A sample of a tree.

    Args:
        identity (`int`):
            What names it, not negative.
        path (`numpy.ndarray` of shape `(T,)`):
            Where each of its tokens stands among the N that are forwarded, ascending.
        record (`numpy.ndarray` of shape `(T - 1, L, K)`):
            Packed ids.
        versions (`numpy.ndarray` of shape `(T - 1,)`):
            Version of the weights that each row was recorded at; -1 where the weights changed meanwhile.
        counts (`numpy.ndarray` of shape `(T,)`):
            Whether the loss counts the prediction of a token.
        goes_live (`numpy.ndarray` of shape `(T - 1,)`):
            Rows that are meant to route live, whatever is recorded.
    """

    identity: int
    path: np.ndarray
    record: np.ndarray
    versions: np.ndarray
    counts: np.ndarray
    goes_live: np.ndarray


@dataclass
class TreeRecord:
    """
    One row for each forwarded token: that of the first sample which has the token and a row of it.

    Args:
        rows (`torch.Tensor` of shape `(N, L, K)`):
            Packed ids; missing at the last token of each sample, which was never fed.
        owners (`torch.Tensor` of shape `(N,)`):
            Identity of the sample whose row it is, -1 where there is none.
        versions (`torch.Tensor` of shape `(N,)`):
            Version of the weights at which a row and all rows before it were recorded, -1 where there is no such one.
        matters, missing, live (`int`):
            Tokens that the loss depends on, how many of these have no row, and how many of those are meant to.
        shared, conflicts (`int`):
            Rows of samples that the row of another sample stands for, and how many of these name other experts.
    """

    rows: Tensor
    owners: Tensor
    versions: Tensor
    matters: int
    missing: int
    live: int
    shared: int
    conflicts: int

    @classmethod
    def of(cls, samples: Sequence[TreeSample], num_tokens: int, layout: RoutingLayout) -> TreeRecord:
        """
        Lay the records of samples onto their tree.

        Args:
            samples (sequence of [`TreeSample`]):
                The first one wins where several have a row of a token.
            num_tokens (`int`):
                N.
            layout ([`RoutingLayout`]):
                Layers and experts of the model.
        """
        size = (num_tokens, len(layout.moe_layers), layout.top_k)
        rows = torch.full(size, layout.missing, dtype=layout.storage_dtype, device="cpu")
        ids, owners, versions = rows.numpy(), np.full(num_tokens, -1), np.full(num_tokens, NO_VERSION)
        matters, live = np.zeros(num_tokens, bool), np.zeros(num_tokens, bool)
        shared = conflicts = 0
        for sample in samples:
            at = sample.path[:-1]
            recorded = (sample.record[:, 0, 0] != layout.missing) & ~sample.goes_live
            is_new, is_shared = recorded & (owners[at] < 0), recorded & (owners[at] >= 0)
            shared += int(is_shared.sum())
            conflicts += _count_different(sample.record[is_shared], ids[at[is_shared]])
            new = at[is_new]
            ids[new], owners[new], versions[new] = sample.record[is_new], sample.identity, sample.versions[is_new]
            live[at[sample.goes_live]] = True
            (targets,) = np.nonzero(sample.counts[1:])
            if len(targets):  # the row before a token predicts it
                matters[at[: targets[-1] + 1]] = True
        for sample in samples:
            of_path = versions[sample.path[:-1]]
            same = np.logical_and.accumulate(of_path == of_path[:1])
            versions[sample.path[:-1]] = np.where(same, of_path, NO_VERSION)
        missing = matters & (owners < 0)
        return cls(
            rows,
            torch.from_numpy(owners),
            torch.from_numpy(versions),
            int(matters.sum()),
            int(missing.sum()),
            int((missing & live).sum()),
            shared,
            conflicts,
        )


def _count_different(mine: np.ndarray, theirs: np.ndarray) -> int:
    """Rows that select other sets of experts: few differ at all, and only these are sorted."""
    unequal = (mine != theirs).any((1, 2))
    return int((np.sort(mine[unequal], -1) != np.sort(theirs[unequal], -1)).any((1, 2)).sum())
