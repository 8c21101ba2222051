"""What is healthy of each metric: one place for the verdict of a report, its pictures and the heat maps.

The ranges are those of the table of metrics in the docs. Kappa is corrected for chance, and k3 and F(2) are of tokens,
so that none of them depends on the number of experts; what a router selects and how its load spreads do.

Legend: E experts, K experts per token.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from statistics import NormalDist

MAX_OVER_MEAN = "routing_replay/load/max_over_mean"
PAPER = (8, 128)  # K and E of Qwen3-30B-A3B, which the R3 paper trains (arXiv 2510.11370); where a run tells none
CHANGED_THERE = 0.2  # the paper saw 0.1 of the routers change, with a rollout in bfloat16
K3 = 1e-3  # two forwards of one training engine differ by 8.4e-4 in the paper
EXTREME = 1e-3  # a rule of thumb: one token in a thousand
KAPPA = 0.8  # what right records measured at least (beside MIN_KAPPA of the alarm)
LOAD = 4.0  # a rule of thumb: times the even share
LOAD_OF_ALL = 0.75  # likewise, where E / K is low: as a share of E / K, at which every token goes to the expert


@dataclass(frozen=True)
class HealthyRange:
    """From where to where a metric is healthy, and what to do outside."""

    low: float
    high: float
    outside: str

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        if self.high == sys.float_info.max:
            return "a number"
        if self.low == self.high:
            return f"{self.low:g}"
        return f"above {self.low:g}" if self.high in (1.0, math.inf) else f"below {self.high:.3g}"


# of what TRL logs of training: any value is healthy that is one
A_NUMBER = HealthyRange(
    -sys.float_info.max,
    sys.float_info.max,
    "training has diverged: go back to a checkpoint before, and look at `grad_norm`, the learning rate and the dtype",
)


def healthy_ranges(top_k: int = PAPER[0], num_experts: int = PAPER[1]) -> dict[str, HealthyRange]:
    """
    The ranges of a model with E experts, K of them a token.

    Args:
        top_k, num_experts (`int`, *optional*):
            K and E; those of the R3 paper by default.

    Returns:
        dict of `str` to [`HealthyRange`]: By the names that metrics are logged under.
    """
    changed = CHANGED_THERE * _experts_at_the_edge(top_k, num_experts) / _experts_at_the_edge(*PAPER)
    load = min(LOAD, max(LOAD_OF_ALL * num_experts / top_k, 1.0))
    rounds = "routing is not the cause: look for what rounds, the temperature and the weights of the engine"
    return {
        "routing_replay/missing_frac": HealthyRange(
            0.0, 0.0, "the engine lost rows, which were trained through live experts: `trl-r3 verify`"
        ),
        "routing_replay/agreement": HealthyRange(
            KAPPA, 1.0, "records of other tokens or weights, half collapsed routers or a rollout in eight bits"
        ),
        "routing_replay/contrast": HealthyRange(
            0.0, math.inf, "a record moved by one token fits as well: the first row is that of the first prompt token"
        ),
        "routing_replay/changed_router_frac": HealthyRange(
            0.0, changed, "usual in eight bits; growing within a run: fewer updates a rollout, a lower learning rate"
        ),
        "sampling/k3_kl": HealthyRange(0.0, K3, rounds),
        "sampling/extreme_token_frac": HealthyRange(0.0, EXTREME, rounds),
        MAX_OVER_MEAN: HealthyRange(
            1.0, load, "a router collapses: its auxiliary loss or balancing bias, then the learning rate"
        ),
    }


def _experts_at_the_edge(top_k: int, num_experts: int) -> float:
    """
    How many of E normal scores lie at the edge of the top-k, in their standard deviation: noise exchanges these.

    With rollouts in bfloat16, 1 of 4 to 8 of 256 experts and equal widths, the share of changed routers was 0.31 to
    0.76 times the bound that follows; with weights in eight bits, 2.0 to 3.2 times.
    """
    if top_k == num_experts:
        return 0.0
    normal = NormalDist()
    return num_experts * normal.pdf(normal.inv_cdf(1 - top_k / num_experts))
