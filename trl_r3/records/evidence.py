"""Whether a record belongs to its tokens, judged where the weights are still those of the rollout.

There the live selection and the record of a token agree up to rounding, and the record of anything else (another
token, layer or sample, or none) agrees by chance.

Legend: M rows of observed tokens, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .agreement import shared_experts
from .judgement import Judge, Rows, Verdict
from .layout import RoutingLayout

# Tokens of a text repeat, so rows say less than their number. With as many, right and wrong are apart.
MIN_ROWS = 250


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


class RoutingEvidence:
    """
    Collects observations until there are enough to judge.

    Args:
        layout ([`RoutingLayout`]):
            Layers and experts of the model.

    Example:

    ```python
    >>> evidence = RoutingEvidence(replay.layout)
    >>> evidence.add(observation)
    >>> verdict = evidence.verdict()  # None while there are fewer than 250 rows
    >>> evidence.clear()
    ```
    """

    def __init__(self, layout: RoutingLayout):
        self.layout = layout
        self._pool: list[Rows] = []
        # the sum over a set of random numbers, one for each expert, stands for the set
        shape = (2, len(layout.moe_layers), layout.num_experts)
        random = torch.Generator().manual_seed(0)
        self._marks_live, self._marks_recorded = torch.randint(-(2**62), 2**62, shape, generator=random)

    @property
    def rows(self) -> int:
        """Number of rows pooled so far."""
        return sum(len(rows.sample) for rows in self._pool)

    def clear(self) -> None:
        """Forget all rows."""
        self._pool.clear()

    def add(self, observation: Observation) -> None:
        """
        Pool some rows.

        Args:
            observation ([`Observation`]):
                Rows at weights that the rollout ran with.
        """
        ids = (observation.live, observation.recorded, observation.before, observation.after)
        live, recorded, before, after = (tensor.to(torch.int16) for tensor in ids)
        shared = torch.stack([shared_experts(live, other) for other in (recorded, before, after)], dim=1)
        sets = [set_marks(self._marks_recorded, other) for other in (recorded, before, after)]
        self._pool.append(
            Rows(
                observation.sample,
                live,
                recorded,
                shared.double() / self.layout.top_k,
                set_marks(self._marks_live, live) + sets[0],
                (sets[0] != sets[1]) | (sets[0] != sets[2]),
            )
        )

    def statistics(self) -> Verdict:
        """Agreement and contrast of however few rows were pooled, one at least, without looking for faults."""
        return Judge(self._rows(), self.layout).verdict(looks_for_faults=False)

    def verdict(self) -> Verdict | None:
        """
        Judge what was pooled.

        Returns:
            [`Verdict`], or `None` while there are fewer than 250 rows.
        """
        return Judge(self._rows(), self.layout).verdict() if self.rows >= MIN_ROWS else None

    def _rows(self) -> Rows:
        return Rows(*(torch.cat(columns) for columns in zip(*self._pool, strict=True)))


def set_marks(marks_LE: Tensor, ids_MLK: Tensor) -> Tensor:
    """One number for each set of experts of a layer, (M, L), whatever the order of its ids."""
    layers = torch.arange(marks_LE.shape[0])[:, None]
    return marks_LE[layers, ids_MLK.long()].sum(-1)
