"""The handle on the policy of a trainer: from the moment `train()` has prepared it until `train()` is over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ..alarm.evidence import Alarm
from ..engines.turns import SamplingTrainer
from ..routers.discovery import refuse_dense
from ..routers.passes import TrainingGuard
from ..routers.probe import input_device
from ..routers.router_replay import RouterReplay
from .log import ReplayLog, make_together
from .router_shift import RouterShift, shifts


class ReplayingTrainer(SamplingTrainer, Protocol):
    """What replay asks of a trainer, beside what engines do. Its arguments are a [`RoutingReplayConfigMixin`]."""

    args: Any
    model: Any
    ref_model: Any
    state: Any


class Attachment:
    """
    Routing replay on the policy of a trainer, and the alarm, for the time of a training.

    Args:
        trainer ([`ReplayingTrainer`]):
            Whose policy it is.
    """

    def __init__(self, trainer: ReplayingTrainer):
        self.trainer = trainer
        self.alarm: Alarm | None = None
        self.shift: RouterShift | None = None
        self._replay: RouterReplay | None = None
        self._removed: RouterReplay | None = None

    @property
    def replay(self) -> RouterReplay:
        """The handle on the policy, while it trains."""
        if self._replay is None:
            raise RuntimeError("routing replay is attached to the policy only while `train()` runs. Call it inside.")
        return self._replay

    @property
    def handle(self) -> RouterReplay:
        """The handle on the policy, or the last one that was removed from it."""
        return self.replay if self._removed is None else self._removed

    def try_on(self) -> None:
        """Attach and detach, so that unsupported models fail now; ZeRO-3 and FSDP may load weights later."""
        try:
            self._attach(only_with_weights=True)
        finally:
            self.detach()

    def attach(self, judges: bool) -> None:
        """
        Attach to the policy as it will train: weights are sharded and kernels replaced by now.

        Args:
            judges (`bool`):
                Whether the alarm judges the records: those that this package does not make itself.
        """
        self._attach()
        padding = self.replay.padding
        if padding is not None and self.trainer.accelerator.is_main_process:
            padding.say()
        self.alarm = Alarm(self.replay.layout, self.trainer.args.routing_replay_alarm, judges)
        self.shift = RouterShift(self.replay.layout) if shifts(self.trainer.args) else None

    def detach(self) -> None:
        """Give the policy back as it was."""
        if self._replay is not None:
            self._replay.remove()
            self._removed = self._replay
        self._replay = self.alarm = self.shift = None

    def _attach(self, only_with_weights: bool = False) -> None:
        self.detach()
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)

        def attach() -> None:
            refuse_dense(model)
            if not only_with_weights or input_device(model) is not None:
                args = self.trainer.args
                padding = "keep" if only_with_weights else args.routing_replay_padding
                gating = "op" if shifts(args) else args.routing_replay_gating  # which knows routers' scores
                self._replay = RouterReplay(model, gating, padding)
                self._removed = None

        make_together(self.trainer.accelerator, attach)

    @contextmanager
    def training_step(self, log: ReplayLog) -> Iterator[None]:
        """
        A training step inside which each forward of the policy that builds a graph replays, and one of them at least.

        Args:
            log ([`ReplayLog`]):
                Where forwards that go live on purpose are counted.
        """
        guard = TrainingGuard()
        with self.replay.guarded(guard):
            yield
        if guard.replayed + guard.live == 0:
            raise RuntimeError(
                "a training step ended in which no forward of the policy replayed its record. Compute the loss with "
                "the model that the trainer holds, or set `use_routing_replay=False`."
            )
        log.add_live(guard)
