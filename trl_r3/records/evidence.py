"""Whether a record belongs to its tokens: what live routing says about it at weights that have not changed since.

Neither equal sets nor a fixed overlap can tell: a right record of an engine in eight bits agrees with few sets, and
the routers of a trained model send so many tokens to the same experts that any record overlaps with any other. What
tells is the overlap beyond the chance of these very rows, and the contrast to the same record moved by one token.

Legend: M observed rows, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .agreement import shared_experts
from .layout import RoutingLayout

_ENOUGH = (
    250  # rows of a batch, or (row, layer) pairs of a sample: neighbouring rows say the same, so few prove nothing
)
_AGREES = 0.5  # kappa: right records were at 0.82 or more in every precision, wrong ones at 0.25 or less
_TELLING = 0.1  # what chance or the next row leaves open: in layers with less, right and wrong records look alike


@dataclass
class Observation:
    """
    Live and recorded routing in some rows of a batch, on the host. The rows and both their neighbours are recorded.

    Args:
        sample (`torch.Tensor` of shape `(M,)`):
            Identity of the sample that a row belongs to.
        live (`torch.Tensor` of shape `(M, L, K)`):
            Ids that the model selects live.
        recorded, before, after (`torch.Tensor` of shape `(M, L, K)`):
            Ids of the record, and of its rows one token earlier and later.
    """

    sample: Tensor
    live: Tensor
    recorded: Tensor
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class Verdict:
    """
    What the rows say.

    Args:
        agreement_L (`torch.Tensor` of shape `(L,)`):
            Overlap of live and recorded experts beyond chance (Cohen's kappa), 1 where they are the same; NaN where
            chance leaves too little open.
        contrast_L (`torch.Tensor` of shape `(L,)`):
            Overlap less that with the record moved by one token, the better way; NaN where neighbours are alike.
        pooled_contrast (`float`):
            Their mean over the layers that have one.
        fault (`str`, *optional*):
            Why the record cannot be that of its tokens.
    """

    agreement_L: Tensor
    contrast_L: Tensor
    pooled_contrast: float
    fault: str | None = None

    @property
    def agreement(self) -> float:
        """The smallest over layers; NaN where no layer tells."""
        return _smallest(self.agreement_L)

    @property
    def contrast(self) -> float:
        """The smallest over layers; NaN where no layer tells."""
        return _smallest(self.contrast_L)


class RoutingEvidence:
    """
    Pools observations until they are enough to judge.

    Args:
        layout ([`RoutingLayout`]):
            Layers and experts of the model.
    """

    def __init__(self, layout: RoutingLayout):
        self.layout = layout
        self._pooled: list[Observation] = []

    @property
    def rows(self) -> int:
        """Rows pooled so far."""
        return sum(len(observation.sample) for observation in self._pooled)

    def add(self, observation: Observation) -> None:
        """Pool an observation."""
        self._pooled.append(observation)

    def clear(self) -> None:
        """Forget all."""
        self._pooled = []

    def statistics(self) -> Verdict:
        """Agreement and contrast of however few rows there are."""
        rows = _Rows.of(self._pooled, self.layout)
        contrast_L = rows.contrast()
        pooled = contrast_L[~contrast_L.isnan()]
        return Verdict(rows.kappa(rows.recorded), contrast_L, float(pooled.mean()) if len(pooled) else math.nan)

    def verdict(self) -> Verdict | None:
        """Statistics and what is wrong, or `None` while there are too few rows."""
        if self.rows < _ENOUGH:
            return None
        seen, rows = self.statistics(), _Rows.of(self._pooled, self.layout)
        return Verdict(seen.agreement_L, seen.contrast_L, seen.pooled_contrast, _fault(rows, seen))


@dataclass
class _Rows:
    """All rows at once."""

    sample: Tensor
    live: Tensor
    recorded: Tensor
    before: Tensor
    after: Tensor
    layout: RoutingLayout

    @classmethod
    def of(cls, observations: Sequence[Observation], layout: RoutingLayout) -> _Rows:
        columns = {f.name: torch.cat([getattr(each, f.name) for each in observations]) for f in fields(Observation)}
        return cls(**{name: column.long() for name, column in columns.items()}, layout=layout)

    def among(self, chosen_M: Tensor) -> _Rows:
        """Some of the rows."""
        columns = {f.name: getattr(self, f.name)[chosen_M] for f in fields(Observation)}
        return _Rows(**columns, layout=self.layout)

    def overlap(self, record: Tensor) -> Tensor:
        """(M, L) shares of the K experts that live routing has in common with a record."""
        return shared_experts(self.live, record).double() / self.layout.top_k

    def chance(self, record: Tensor) -> Tensor:
        """(L,) overlap to be expected if live and recorded rows of a layer were paired at random."""
        return (_shares(self.live, self.layout) * _shares(record, self.layout)).sum(1) / self.layout.top_k

    def kappa(self, record: Tensor) -> Tensor:
        """(L,) overlap with a record beyond chance."""
        chance_L = self.chance(record)
        kappa_L = (self.overlap(record).mean(0) - chance_L) / (1 - chance_L)
        return kappa_L.masked_fill(1 - chance_L < _TELLING, math.nan)

    def contrast(self) -> Tensor:
        """(L,) overlap with the record less that with its neighbours."""
        top_k = self.layout.top_k
        alike_L = torch.stack([
            shared_experts(self.recorded, other).double().mean(0) / top_k for other in (self.before, self.after)
        ]).amax(0)  # fmt: skip
        moved_L = torch.stack([self.overlap(self.before).mean(0), self.overlap(self.after).mean(0)]).amax(0)
        return (self.overlap(self.recorded).mean(0) - moved_L).masked_fill(1 - alike_L < _TELLING, math.nan)

    def kappa_of_samples(self) -> dict[int, float]:
        """Overlap beyond the chance of the batch, over all layers that tell, of each sample with enough rows."""
        chance_L = self.chance(self.recorded)
        telling_L = 1 - chance_L >= _TELLING
        if not telling_L.any():
            return {}
        chance = float(chance_L[telling_L].mean())
        overlap_M = self.overlap(self.recorded)[:, telling_L].mean(1)
        found = {}
        for identity in self.sample.unique().tolist():
            own_M = self.sample == identity
            if int(own_M.sum()) * int(telling_L.sum()) >= _ENOUGH:
                found[identity] = (float(overlap_M[own_M].mean()) - chance) / (1 - chance)
        return found


def _shares(ids: Tensor, layout: RoutingLayout) -> Tensor:
    """(L, E) shares of the rows that have an expert."""
    rows, layers, _ = ids.shape
    place = ids + torch.arange(layers)[:, None] * layout.num_experts
    counts = torch.bincount(place.flatten(), minlength=layers * layout.num_experts)
    return counts.double().unflatten(0, (layers, layout.num_experts)) / rows


def _smallest(values: Tensor) -> float:
    known = values[~values.isnan()]
    return float(known.min()) if len(known) else math.nan


def _fault(rows: _Rows, seen: Verdict) -> str | None:
    """The whole message, if the record is not that of its tokens."""
    fact = _moved(rows, seen) or _wrong_samples(rows) or _wrong_layer(rows, seen)
    if fact is None and seen.pooled_contrast < 0:
        fact = f"its rows fit their tokens no better than those of the next ones (contrast {seen.pooled_contrast:.2f})"
    if fact is None:
        return None
    return (
        f"the record of the rollout is not that of its tokens: {fact}. At the weights of the rollout, live routing "
        f"and a right record agree beyond chance with kappa {_AGREES} or more, over {len(rows.sample)} rows. Check "
        "the version of the engine and its routed-experts flag, that it serves the trained weights, the order in "
        "which a `rollout_func` returns samples, and where its rows begin (the first is that of the first prompt "
        "token). `routing_replay_alarm='warn'` trains on."
    )


def _moved(rows: _Rows, seen: Verdict) -> str | None:
    if not seen.pooled_contrast < 0:
        return None
    kappas = {"earlier": _mean(rows.kappa(rows.before)), "later": _mean(rows.kappa(rows.after))}
    way = max(kappas, key=lambda name: kappas[name])
    if not kappas[way] >= _AGREES:
        return None
    layer = rows.layout.moe_layers[0]
    return (
        f"it is moved by one token, from layer {layer} on: each row fits the token whose row stands one {way} (kappa "
        f"{kappas[way]:.2f}, and {_mean(seen.agreement_L):.2f} where it stands)"
    )


def _wrong_samples(rows: _Rows) -> str | None:
    kappas = rows.kappa_of_samples()
    wrong = [identity for identity, kappa in kappas.items() if kappa < _AGREES]
    if not wrong or len(wrong) == len(kappas):
        return None
    others = rows.among(~torch.isin(rows.sample, torch.tensor(wrong)))
    if not _smallest(others.kappa(others.recorded)) >= _AGREES:
        return None  # a layer is wrong in all of them
    named = ", ".join(f"sample {identity} (kappa {kappas[identity]:.2f})" for identity in wrong[:8])
    return f"{len(wrong)} of {len(kappas)} samples have rows of other tokens or of another sample: {named}"


def _wrong_layer(rows: _Rows, seen: Verdict) -> str | None:
    wrong = (seen.agreement_L < _AGREES).nonzero()[:, 0].tolist()
    if not wrong:
        return None
    index, layers = wrong[0], rows.layout.moe_layers
    where = (
        f"layer {layers[index]} (the lowest of {len(wrong)} of {len(layers)}) has kappa {seen.agreement_L[index]:.2f}"
    )
    own = rows.recorded[:, index]
    if bool((own == own[:1]).all()):
        return f"{where}, and holds one constant row"
    live = rows.live[:, index : index + 1].expand_as(rows.live)
    elsewhere_L = _Rows(rows.sample, live, rows.recorded, rows.before, rows.after, rows.layout).kappa(rows.recorded)
    elsewhere_L[index] = math.nan
    best = int(elsewhere_L.nan_to_num(-1.0).argmax())
    if elsewhere_L[best] >= _AGREES:
        return f"{where}, but fits the rows of layer {layers[best]} (kappa {elsewhere_L[best]:.2f})"
    return f"{where}, and fits the rows of no other layer: these are other tokens, or another sample"


def _mean(values: Tensor) -> float:
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else math.nan
