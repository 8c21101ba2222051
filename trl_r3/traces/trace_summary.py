"""What traces of a run come to, step by step, without their records.

Legend: C completion tokens that the loss counts, L MoE layers, E experts, S points kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..records.metrics import mismatch_sums
from .trace import Trace, TraceFacts

EVEN_POINTS = 200  # tokens of a trace that are kept, evenly spread,
LARGEST_POINTS = 20  # and those with the largest difference


@dataclass
class Mismatch:
    """Rollout against training, of one way of routing: sums over tokens, and some of the tokens."""

    tokens: int = 0
    diverged: int = 0  # tokens that were sampled, and scored as no number
    k3: float = 0.0  # sum
    extreme: dict[float, int] = field(default_factory=dict)  # by tau
    points: list[Tensor] = field(default_factory=list)  # (S, 2): log p of the rollout, |delta log p|

    def add(self, scored_C: Tensor, rollout_C: Tensor, taus: Sequence[float]) -> None:
        """Take the log-probabilities of some tokens."""
        known = ~rollout_C.isnan() & scored_C.isfinite()
        self.diverged += int((~rollout_C.isnan() & ~scored_C.isfinite()).sum())
        rollout_C, scored_C = rollout_C[known].double(), scored_C[known].double()
        size = (scored_C - rollout_C).abs()
        self.tokens += len(size)
        for tau in taus:
            k3, extreme, _ = mismatch_sums(scored_C, rollout_C, torch.ones_like(rollout_C), tau)
            self.extreme[tau] = self.extreme.get(tau, 0) + int(extreme)
        self.k3 += float(k3)
        if len(size):
            even = (
                torch.linspace(0, len(size) - 1, min(EVEN_POINTS, len(size)), dtype=torch.float32, device="cpu")
                .round()
                .long()
            )
            kept = torch.cat([even, size.topk(min(LARGEST_POINTS, len(size))).indices]).unique()
            self.points.append(torch.stack([rollout_C[kept], size[kept]], dim=1))


@dataclass
class StepSummary:
    """The traces of all processes at one step."""

    step: int
    load_live: Tensor  # (L, E)
    load_recorded: Tensor  # (L, E)
    changed: Tensor  # (L,) pairs
    compared_rows: int = 0
    rows: int = 0
    missing: int = 0
    ranks: set[int] = field(default_factory=set)  # processes whose traces these are,
    num_ranks: set[int] = field(default_factory=set)  # and how many there were: of one run, one number
    agreements: list[float] = field(default_factory=list)
    contrasts: list[float] = field(default_factory=list)
    replayed: Mismatch = field(default_factory=Mismatch)
    live: Mismatch = field(default_factory=Mismatch)

    def add(self, trace: Trace, taus: Sequence[float]) -> None:
        """Take the trace of one process."""
        facts = trace.facts
        self.load_live = self.load_live + trace.load_live
        self.load_recorded = self.load_recorded + trace.load_recorded
        self.changed = self.changed + trace.changed
        self.compared_rows += facts.compared_rows
        self.ranks.add(facts.rank)
        self.num_ranks.add(facts.num_ranks)
        self.rows, self.missing = self.rows + facts.rows, self.missing + facts.missing
        self.agreements += [] if facts.agreement is None else [facts.agreement]
        self.contrasts += [] if facts.contrast is None else [facts.contrast]
        counted, rollout = trace.counted, trace.rollout_logprobs
        if rollout is None:
            return
        self.replayed.add(trace.train_logprobs[counted], rollout[counted], taus)
        if trace.live_logprobs is not None:
            self.live.add(trace.live_logprobs[counted], rollout[counted], taus)


def summarise(traces: Iterable[Trace], taus: Sequence[float]) -> tuple[TraceFacts, list[StepSummary]]:
    """
    Bring the traces of one run together.

    Args:
        traces (iterable of [`Trace`]):
            At least one, of whatever steps and processes.
        taus (sequence of `float`):
            Ratios from which on a token is extreme.

    Returns:
        `tuple[TraceFacts, list[StepSummary]]`: What the first trace says, and a summary of each step, ascending.

    Raises:
        `ValueError`: If they are of different models.
    """
    first: TraceFacts | None = None
    steps: dict[int, StepSummary] = {}
    for trace in traces:
        facts = trace.facts
        first = first or facts
        if (facts.config_digest, facts.layout) != (first.config_digest, first.layout):
            raise ValueError(
                f"the traces are of two models: step {first.step} of a {first.model_type} with config "
                f"{first.config_digest[:8]}, step {facts.step} of a {facts.model_type} with "
                f"{facts.config_digest[:8]}. Keep those of each run in a folder of their own."
            )
        zeros = torch.zeros(trace.load_live.shape, dtype=torch.int64, device="cpu")
        step = steps.setdefault(facts.step, StepSummary(facts.step, zeros, zeros, zeros[:, 0]))
        step.add(trace, taus)
    if first is None:
        raise ValueError("there is no trace to summarise. Pass one at least.")
    return first, [steps[step] for step in sorted(steps)]
