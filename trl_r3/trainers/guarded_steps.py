"""Training steps in which nothing goes live in silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .._compat import swapped
from ..routers.forward_pass import TrainingGuard
from .attaching import AttachingMixin

if TYPE_CHECKING:
    from .rollout import Scoring


class GuardedStepsMixin(AttachingMixin):
    """Each forward of a training step that builds a graph replays, or goes live on purpose."""

    if TYPE_CHECKING:  # what the trainer has
        _scoring: Scoring | None
        _masked: Scoring | None

    def training_step(self, *args, **kwargs):
        """`training_step` of TRL: each of its forwards that builds a graph replays, and one of them at least."""
        if not self._use_replay:
            return super().training_step(*args, **kwargs)
        guard = TrainingGuard()
        with swapped(self.routing_replay, "guard", guard):
            loss = super().training_step(*args, **kwargs)
        if guard.replayed + guard.live == 0:
            raise RuntimeError(
                "a training step ended in which no forward of the policy replayed its record. Compute the loss with "
                "the model that the trainer holds, or set `use_routing_replay=False`."
            )
        self._log_live(guard)
        return loss

    @contextmanager
    def live_routing(self) -> Iterator[None]:
        """
        Let forwards of a training step go live on purpose, which is an error elsewhere. Their rows are logged as not
        replayed.

        Example:

        ```python
        >>> with trainer.live_routing():
        ...     auxiliary = model(input_ids=other_ids).logits
        ```
        """
        guard = self.routing_replay.guard or TrainingGuard()
        with swapped(self, "_scoring", None), swapped(self, "_masked", None), swapped(guard, "allows_live", True):
            yield
