"""Whether a record belongs to its tokens, judged where the weights are still those of the rollout.

There the live selection and the record of a token agree up to rounding, and the record of anything else (another
token, layer or sample, or none) agrees by chance.

Legend: M rows of observed tokens, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._compat import warn
from ..records.checks import MisalignedRecordError
from ..records.metrics import shared_experts
from ..records.record import RoutingLayout
from ..records.samples import Observation
from .judge import MIN_KAPPA, Found, Judge, Rows

# Tokens of a text repeat, so rows say less than their number. With as many, right and wrong are apart.
MIN_ROWS = 250


_TO_CHECK = (
    "Check the version of the engine and its routed-experts flag, that it serves the trained weights, that training "
    "drops little out (`disable_dropout=True`), the order in which a `rollout_func` returns samples, and where its "
    "rows begin (the first is that of the first prompt token). `routing_replay_alarm='warn'` trains on."
)


@dataclass(frozen=True)
class Verdict:
    """
    What the observations say about a record.

    Args:
        agreement_L (`torch.Tensor` of shape `(L,)`, `torch.float64`):
            Kappa. NaN where the live routes are all but constant: there is nothing to tell apart.
        contrast_L (`torch.Tensor` of shape `(L,)`, `torch.float64`):
            Contrast. NaN where the record does not vary from token to token.
        pooled_contrast (`float`):
            Contrast over all layers whose records vary from token to token.
        rows (`int`):
            Number of observed rows.
        found ([`Found`], *optional*):
            What is wrong, if the record does not belong to its tokens.
    """

    agreement_L: Tensor
    contrast_L: Tensor
    pooled_contrast: float
    rows: int
    found: Found | None

    @property
    def agreement(self) -> float:
        """The smallest over the layers, without NaN."""
        return _smallest(self.agreement_L)

    @property
    def contrast(self) -> float:
        """The smallest over the layers, without NaN."""
        return _smallest(self.contrast_L)

    @property
    def fault(self) -> str | None:
        """What is wrong and what to check, as an error says it."""
        if self.found is None:
            return None
        return (
            f"the record of the rollout is not that of its tokens: {self.found.fact}. At the rollout's weights, live "
            f"routing agrees with a right record beyond chance (kappa {MIN_KAPPA} or more; here {self.agreement:.2f}) "
            f"and better than with one moved by a token (contrast above 0; here {self.pooled_contrast:.2f}), over "
            f"{self.rows} rows. {_TO_CHECK}"
        )


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
        random = torch.Generator("cpu").manual_seed(0)
        self._marks_live, self._marks_recorded = torch.randint(-(2**62), 2**62, shape, generator=random, device="cpu")

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
        judge = self._judge()
        return Verdict(judge.kappa_L, judge.contrast_L, judge.pooled_contrast, self.rows, None)

    def verdict(self) -> Verdict | None:
        """
        Judge what was pooled.

        Returns:
            [`Verdict`], or `None` while there are fewer than 250 rows.
        """
        if self.rows < MIN_ROWS:
            return None
        judge = self._judge()
        return Verdict(judge.kappa_L, judge.contrast_L, judge.pooled_contrast, self.rows, judge.find())

    def _judge(self) -> Judge:
        return Judge(Rows(*(torch.cat(columns) for columns in zip(*self._pool, strict=True))), self.layout)


def set_marks(marks_LE: Tensor, ids_MLK: Tensor) -> Tensor:
    """One number for each set of experts of a layer, (M, L), whatever the order of its ids."""
    layers = torch.arange(marks_LE.shape[0], device="cpu")[:, None]
    return marks_LE[layers, ids_MLK.long()].sum(-1)


def _smallest(values: Tensor) -> float:
    known = values[~values.isnan()]
    return known.min().item() if len(known) else float("nan")


class Alarm:
    """
    Collects what live routing says about the records of a training, and says what is to be done about it.

    Args:
        layout ([`RoutingLayout`]):
            Layers and experts of the model.
        action (`str`):
            `"error"`, `"warn"` or `"off"`.
        judges (`bool`):
            Whether records are judged: those that this package did not make itself.
    """

    def __init__(self, layout: RoutingLayout, action: str, judges: bool):
        self.action = action if judges else "off"
        self.layout = layout
        self.evidence = RoutingEvidence(layout)
        self._said = False

    def look(self, observations: Sequence[Observation]) -> Verdict | None:
        """
        Pool what one or several forwards at the weights of their rollout have shown.

        Args:
            observations (sequence of [`Observation`]):
                What was seen.

        Returns:
            [`Verdict`], *optional*: Its statistics, without a judgement; `None` where no row was seen.
        """
        fresh = RoutingEvidence(self.layout)
        for observation in observations:
            fresh.add(observation)
            self.evidence.add(observation)
        return fresh.statistics() if fresh.rows else None

    def judge(self) -> MisalignedRecordError | None:
        """
        Judge what has been pooled. With few rows this waits for those of later rollouts, each at its own weights.

        Returns:
            [`MisalignedRecordError`], *optional*: What is to be raised.
        """
        verdict = self.evidence.verdict()
        if verdict is None:
            return None
        self.evidence.clear()
        if self.action == "off":
            return None
        if math.isnan(verdict.agreement):
            self._say_that_nothing_can_be_told()
        if verdict.fault is None:
            return None
        if self.action == "error":
            return MisalignedRecordError(verdict.fault)
        warn(verdict.fault)
        return None

    def _say_that_nothing_can_be_told(self) -> None:
        if not self._said:
            self._said = True
            warn(
                "all rows of the rollout were routed to the same experts, live and in the record, so nothing can tell "
                "a right record from a moved one. If the routers are not meant to have collapsed, look at their "
                "auxiliary loss."
            )
