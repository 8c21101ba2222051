"""A word to whoever trains with so much mismatch of live routing that it decides what is learned.

Legend: B batch, C completion tokens.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from .._compat import warn
from ..records.metrics import k3_kl
from .log import counted_tokens

DECIDING_K3 = 0.05
"""From here on live routing fell behind replay in `benchmarks/decides`; docs/when_it_helps.md has the runs."""

_FEWEST, _MOST = 3, 10  # values that are judged together: a single batch scatters


class DecidingMismatch:
    """Watches the k3 of live routing over a run, and warns once if it passes [`DECIDING_K3`] in the mean."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_MOST)
        self._has_warned = False

    def look_at_log(self, logs: dict[str, Any], replays: bool) -> None:
        """
        Look at what is about to be logged.

        Args:
            logs (`dict[str, Any]`):
                With `sampling/live/k3_kl`, or, of a run that scores rollouts live, `sampling/k3_kl`.
            replays (`bool`):
                Whether rollouts are scored with their experts.
        """
        self._look(logs.get("sampling/live/k3_kl" if replays else "sampling/k3_kl"), replays)

    def look_at_batch(self, batch: dict[str, Any]) -> None:
        """Look at a batch of TRL that nothing was recorded of, if it has both (B, C) log-probabilities."""
        train, sampled = batch.get("old_per_token_logps"), batch.get("sampling_per_token_logps")
        if not self._has_warned and train is not None and sampled is not None:
            self._look(float(k3_kl(train, sampled, counted_tokens(batch))), replays=False)

    def _look(self, k3: float | None, replays: bool) -> None:
        if k3 is None or not math.isfinite(k3) or self._has_warned:
            return
        self._recent.append(k3)
        mean = sum(self._recent) / len(self._recent)
        if len(self._recent) < _FEWEST or mean <= DECIDING_K3:
            return
        self._has_warned = True
        remedy = "Keep `use_routing_replay=True`." if replays else "Set `use_routing_replay=True` and mode 'R3'."
        warn(
            f"with live routing k3 between rollout and training is {mean:.3g} in the mean of {len(self._recent)} "
            f"steps, above {DECIDING_K3:g}: from there on GRPO with live routing fell behind replay in our runs "
            f"(docs/when_it_helps.md). {remedy}"
        )
