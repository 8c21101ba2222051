"""What pooled rows say about a record, and what it fits better where it does not fit its tokens.

Three statistics, each corrected by what the batch itself shows, so that no bound depends on the number of experts, on
K or on the precision of the rollout:

* kappa = (o - c) / (1 - c) of a layer, where o is the mean overlap |live n recorded| / K and c the overlap of rows
  that are drawn at random: the sum over experts of (share of rows live) * (share of rows recorded) / K.
* contrast = o - max(o_before, o_after), where the record is moved by one token: neighbours share experts, so a moved
  record keeps a high kappa, but one of its neighbours fits better.
* kappa of one sample over all of its layers: a few wrong samples hide in the mean of a batch.

Legend: M rows of observed tokens, L MoE layers, E experts, K experts per token, S samples.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from ..records.metrics import shared_experts
from ..records.record import RoutingLayout

# Right records measured 0.8 and more, whatever the rollout's precision; wrong ones 0.25 and less.
MIN_KAPPA = 0.5
# Where routers have half collapsed, rounding moves all tokens from one expert at the edge of the top-k to another, and
# kappa falls to 0 with a right record. But it reaches 0.8 or more of what is possible, given how often
# each expert is selected on either side. So does a record with hardly an expert in common, whose overlap is low.
MIN_OVERLAP = 0.5
MIN_REACHED = 0.5
# Such a record may be constant where two tokens differ, live, in 0.2 of their experts (others: 0.27 and more).
CLEAR_VARIATION = 0.25
# (row, layer) pairs of a sample. Its layers are as good as rows, for a wrong sample is wrong in all of them.
MIN_PAIRS = 250
# Two tokens of the batch must differ, live, in this share of their experts. Where a router sends all tokens to the
# same experts, which ones are at the edge of the top-k is a matter of rounding, and any token's record is right.
MIN_VARIATION = 0.1
# A standard error is one of different observations, and few of these have none: a sample that repeats a token is one.
MIN_DISTINCT = 10
# Standard errors. A right record is far above MIN_KAPPA, so two below it are enough. But where routes hardly vary from
# token to token, a right contrast is about its bound, 0, and on either side of it.
KAPPA_ERRORS = 2.0
CONTRAST_ERRORS = 3.0
# A sample is moved if moving it back wins this share of what chance leaves open. One rare token does not.
MIN_GAIN = 0.1
# A layer has the rows of all samples, so less of it is no chance: text in which four of five tokens repeat the one
# before leaves a moved record 0.09 to win.
MIN_LAYER_GAIN = 0.05
# An error names no more samples than this.
MAX_NAMED = 8

_SIDES = {1: "earlier", 2: "later"}


class Fault(Enum):
    """What is wrong with a record."""

    MOVED = "all rows belong to a neighbouring token"
    OTHER_SAMPLES = "some samples have rows of other tokens"
    CONSTANT_LAYER = "a layer repeats one row"
    OTHER_LAYER = "a layer has rows of another layer"
    OTHER_WEIGHTS = "a layer fits its tokens, but loosely"
    OTHER_TOKENS = "rows of other tokens or samples"


class Found(NamedTuple):
    """A fault, and the fact that shows it, in words."""

    kind: Fault
    fact: str


class Rows(NamedTuple):
    """Pooled rows, as far as they are needed."""

    sample: Tensor  # (M,)
    live: Tensor  # (M, L, K)
    recorded: Tensor  # (M, L, K)
    shared: Tensor  # (M, 3, L) share of the live experts in the record of the token, of that before and that after
    pairs: Tensor  # (M, L) one number for each pair of a live and a recorded set
    moves: Tensor  # (M, L) whether the record is another set before or after


def _shares(ids_MLK: Tensor, num_experts: int) -> Tensor:
    """Share of rows whose set has an expert, (L, E)."""
    rows, layers = ids_MLK.shape[:2]
    slots = ids_MLK.long() + num_experts * torch.arange(layers, device="cpu")[:, None]
    counts = torch.bincount(slots.flatten(), minlength=layers * num_experts)
    return counts.reshape(layers, num_experts).double() / rows


def _is_wrong(shared: Tensor, error: Tensor, chance: Tensor, ceiling: Tensor) -> Tensor:
    """Whether live routing and the record share too little: their mean overlap, its error, by chance, and at most."""
    shared = shared + KAPPA_ERRORS * error
    disagrees = shared - chance < MIN_KAPPA * (1 - chance)
    return disagrees & ((shared < MIN_OVERLAP) | (shared - chance < MIN_REACHED * (ceiling - chance)))


def _listed(numbers: Tensor, values: Tensor, name: str) -> str:
    pairs = zip(numbers[:MAX_NAMED].tolist(), values[:MAX_NAMED].tolist(), strict=True)
    more = f" and {len(numbers) - MAX_NAMED} more" if len(numbers) > MAX_NAMED else ""
    return ", ".join(f"sample {number} ({name} {value:.2f})" for number, value in pairs) + more


class _Samples:
    """The samples one by one, over the layers whose live routes vary."""

    def __init__(self, rows: Rows, layers_L: Tensor):
        self.numbers_S, self.index_M = rows.sample.unique(return_inverse=True)
        self.pairs_S = torch.bincount(self.index_M) * layers_L.sum()
        # equal pairs of a sample are one token seen several times
        marks, order = (rows.pairs[:, layers_L] + self.index_M[:, None] * 0x5851F42D4C957F2D).flatten().sort()
        first = torch.cat([torch.ones(1, dtype=torch.bool, device="cpu"), marks[1:] != marks[:-1]])
        sample = self.index_M.repeat_interleave(int(layers_L.sum()))[order[first]]
        self.distinct_S = torch.bincount(sample, minlength=len(self.numbers_S))
        self.enough_S = (self.pairs_S >= MIN_PAIRS) & (self.distinct_S >= MIN_DISTINCT)

    def mean_and_error(self, values_ML: Tensor) -> tuple[Tensor, Tensor]:
        """Of each sample, over rows and layers: (S,) each."""
        sums_2S = torch.zeros(2, len(self.numbers_S), dtype=torch.float64, device="cpu")
        sums_2S.index_add_(1, self.index_M, torch.stack([values_ML.sum(1), values_ML.square().sum(1)]))
        mean_S, square_S = sums_2S / self.pairs_S
        return mean_S, ((square_S - mean_S.square()).clamp_min(0) / self.distinct_S).sqrt()


class Judge:
    """The statistics of pooled rows, and what they amount to."""

    def __init__(self, rows: Rows, layout: RoutingLayout):
        self.rows, self.layout = rows, layout
        live_LE, recorded_LE = (_shares(ids, layout.num_experts) for ids in (rows.live, rows.recorded))
        self.chance_L = self._chance(live_LE, recorded_LE)
        self.ceiling_L = torch.minimum(live_LE, recorded_LE).sum(1) / layout.top_k
        variation_L = 1 - self._chance(live_LE, live_LE)
        self.judged_L = variation_L >= MIN_VARIATION
        self.kappa_L = self._kappa(rows.shared[:, 0])
        self.moving_L = rows.moves.any(0)
        # rows that agree in all layers are one token seen several times
        self.distinct = len(rows.pairs.sum(1).unique())
        error_L = rows.shared[:, 0].std(0) / self.distinct**0.5
        wrong_L = _is_wrong(rows.shared[:, 0].mean(0), error_L, self.chance_L, self.ceiling_L)
        is_constant_L = (rows.recorded.sort(-1).values == rows.recorded[:1].sort(-1).values).all(2).all(0)
        wrong_L |= is_constant_L & (variation_L >= CLEAR_VARIATION)
        self.wrong_L = wrong_L & self.judged_L & (self.distinct >= MIN_DISTINCT)

    @property
    def contrast_L(self) -> Tensor:
        """Contrast of each layer; NaN where the record does not vary from token to token."""
        shared_3L = self.rows.shared.mean(0)
        return (shared_3L[0] - shared_3L[1:].amax(0)).masked_fill(~self.moving_L, float("nan"))

    @property
    def pooled_contrast(self) -> float:
        """Contrast over all layers whose records vary from token to token."""
        shared_3 = self._shared_3()
        return (shared_3[0] - shared_3[1:].max()).item()

    def find(self) -> Found | None:
        """What is wrong with the record."""
        found = self._moved() or self._wrong_samples() or self._moved_layer() or self._wrong_layer()
        return found or self._moved(by_one=False)

    def _shared_3(self) -> Tensor:
        return self.rows.shared.mean(0)[:, self.moving_L].mean(1)

    def _chance(self, one_LE: Tensor, other_LE: Tensor) -> Tensor:
        return (one_LE * other_LE).sum(-1) / self.layout.top_k

    def _kappa(self, shared_ML: Tensor) -> Tensor:
        kappa_L = (shared_ML.mean(0) - self.chance_L) / (1 - self.chance_L)
        return kappa_L.masked_fill(~self.judged_L, float("nan"))

    def _better_neighbour(self, shared_3: Tensor) -> int | None:
        """Which neighbour's record fits better: 1 before, 2 after."""
        side = 1 + int(shared_3[1:].argmax())
        gain_M = (self.rows.shared[:, side] - self.rows.shared[:, 0])[:, self.moving_L].mean(1)
        is_better = gain_M.mean() > CONTRAST_ERRORS * gain_M.std() / self.distinct**0.5
        return side if is_better and self.distinct >= MIN_DISTINCT else None

    def _moved(self, by_one: bool = True) -> Found | None:
        shared_3 = self._shared_3()
        side = self._better_neighbour(shared_3)
        if side is None:
            return None
        fits = (
            f"each row fits the token whose row stands one {_SIDES[side]} (overlap {shared_3[side]:.2f}, and "
            f"{shared_3[0]:.2f} where it stands)"
        )
        # in the lowest layer: the experts of a wrong record spoil what the layers above select
        kappa_L = self._kappa(self.rows.shared[:, side])[self.moving_L & self.judged_L]
        if len(kappa_L) > 0 and kappa_L[0] >= MIN_KAPPA:
            return Found(Fault.MOVED, f"it is moved by one token, from layer {self.layout.moe_layers[0]} on: {fits}")
        return None if by_one else Found(Fault.OTHER_TOKENS, f"it is that of other tokens: {fits}")

    def _wrong_samples(self) -> Found | None:
        if not self.judged_L.any():
            return None
        samples = _Samples(self.rows, self.judged_L)
        return self._moved_samples(samples) or self._swapped_samples(samples)

    def _moved_samples(self, samples: _Samples) -> Found | None:
        lowest = int(self.judged_L.nonzero()[0])
        for side, name in _SIDES.items():
            gain_ML = self.rows.shared[:, side] - self.rows.shared[:, 0]
            gain_S, error_S = samples.mean_and_error(gain_ML[:, self.judged_L])
            moved_S = (gain_S > MIN_GAIN * (1 - self.chance_L[self.judged_L].mean())) & (
                gain_S > CONTRAST_ERRORS * error_S
            )
            moved_S &= samples.enough_S
            moved_M = moved_S[samples.index_M]
            if moved_S.any() and self._kappa(self.rows.shared[moved_M, side])[lowest] >= MIN_KAPPA:
                moved = _listed(samples.numbers_S[moved_S], gain_S[moved_S], "overlap higher by")
                count = f"{int(moved_S.sum())} of {int(samples.enough_S.sum())} samples"
                return Found(
                    Fault.MOVED,
                    f"{count} are moved by one token: each row fits the token whose row stands one {name}: {moved}",
                )
        return None

    def _swapped_samples(self, samples: _Samples) -> Found | None:
        shared_S, error_S = samples.mean_and_error(self.rows.shared[:, 0][:, self.judged_L])
        chance, ceiling = self.chance_L[self.judged_L].mean(), self.ceiling_L[self.judged_L].mean()
        kappa_S = (shared_S - chance) / (1 - chance)
        wrong_S = _is_wrong(shared_S, error_S, chance, ceiling) & samples.enough_S
        rest_M = ~wrong_S[samples.index_M]
        if not wrong_S.any() or not rest_M.any():
            return None
        if (self._kappa(self.rows.shared[rest_M, 0])[self.wrong_L] < MIN_KAPPA).any():
            return None  # a layer that is wrong without these samples as well
        count = f"{int(wrong_S.sum())} of {int(samples.enough_S.sum())} samples"
        wrong = _listed(samples.numbers_S[wrong_S], kappa_S[wrong_S], "kappa")
        return Found(Fault.OTHER_SAMPLES, f"{count} have rows of other tokens or of another sample: {wrong}")

    def _moved_layer(self) -> Found | None:
        """A layer that fits far better where it is moved, beside others that do not: their contrast hides its own."""
        shared_3L = self.rows.shared.mean(0)
        stands_L = (shared_3L[0] >= shared_3L[1:].max(0).values) & self.judged_L
        for index in (self.moving_L & self.judged_L).nonzero()[:, 0].tolist() if stands_L.any() else ():
            shared_M3 = self.rows.shared[:, :, index]
            side = 1 + int(shared_M3[:, 1:].mean(0).argmax())
            gain_M = shared_M3[:, side] - shared_M3[:, 0]
            least = max(
                MIN_LAYER_GAIN * (1 - self.chance_L[index]), CONTRAST_ERRORS * gain_M.std() / self.distinct**0.5
            )
            fits = self._kappa(self.rows.shared[:, side])[index] >= MIN_KAPPA
            if self.distinct >= MIN_DISTINCT and gain_M.mean() > least and fits:
                here, there = shared_M3.mean(0)[[0, side]].tolist()
                return Found(
                    Fault.MOVED,
                    f"layer {self.layout.moe_layers[index]} is moved by one token: each of its rows fits the token "
                    f"whose row stands one {_SIDES[side]} (overlap {there:.2f}, and {here:.2f} where it stands)",
                )
        return None

    def _wrong_layer(self) -> Found | None:
        if not self.wrong_L.any():
            return None
        index = int(self.wrong_L.nonzero()[0])
        ordered_MK = self.rows.recorded[:, index].sort(-1).values
        if (ordered_MK == ordered_MK[0]).all():
            fits = Found(Fault.CONSTANT_LAYER, "and holds one constant row")
        else:
            fits = self._other_layer(index) or self._other_weights(index)
        layers = self.layout.moe_layers
        where = f"layer {layers[index]} (the lowest of {int(self.wrong_L.sum())} of {len(layers)})"
        return Found(fits.kind, f"{where} has kappa {self.kappa_L[index]:.2f}, {fits.fact}")

    def _other_layer(self, index: int) -> Found | None:
        live_MLK, recorded_MLK = self.rows.live, self.rows.recorded
        # where its own rows went, whose rows it has, and, as a wrong record spoils the layers above, whose it repeats
        one, other = (live_MLK, recorded_MLK, recorded_MLK), (recorded_MLK, live_MLK, recorded_MLK)
        kappa_3L = torch.stack(
            [self._kappa_between(a[:, index : index + 1], b) for a, b in zip(one, other, strict=True)]
        )
        kappa_3L[:, index] = float("-inf")
        kappa_3L = kappa_3L.nan_to_num(nan=float("-inf"))
        best = int(kappa_3L.argmax())
        way, layer = divmod(best, len(self.layout.moe_layers))
        if kappa_3L[way, layer] < MIN_KAPPA:
            return None
        text = ("but fits the rows of", "and holds the rows of", "and repeats the rows of")[way]
        fact = f"{text} layer {self.layout.moe_layers[layer]} (kappa {kappa_3L[way, layer]:.2f})"
        return Found(Fault.OTHER_LAYER, fact)

    def _other_weights(self, index: int) -> Found:
        gain_M = (self.rows.shared[:, 0] - self.rows.shared[:, 1:].amax(1))[:, index]
        if gain_M.mean() > CONTRAST_ERRORS * gain_M.std() / self.distinct**0.5:
            fact = "but fits its tokens better than the next ones: of other weights, or right in some samples only"
            return Found(Fault.OTHER_WEIGHTS, fact)
        return Found(
            Fault.OTHER_TOKENS, "and fits the rows of no other layer: these are other tokens, or another sample"
        )

    def _kappa_between(self, one_MLK: Tensor, other_MLK: Tensor) -> Tensor:
        shared_L = shared_experts(one_MLK, other_MLK).double().mean(0) / self.layout.top_k
        shares = (_shares(ids, self.layout.num_experts) for ids in (one_MLK, other_MLK))
        chance_L = self._chance(*shares)
        return (shared_L - chance_L) / (1 - chance_L)
