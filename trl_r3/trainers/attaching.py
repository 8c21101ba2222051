"""When a trainer is attached to its policy: from the moment `train()` has prepared it until `train()` is over."""

from __future__ import annotations

from ..routers.discovery import refuse_dense
from ..routers.probe import input_device
from ..routers.router_replay import RouterReplay
from .alarm import Alarm
from .log import ReplayLogMixin
from .rollout import Rollout
from .together import make_together
from .tracing import Tracer


class AttachingMixin(ReplayLogMixin):
    """Holds what lives as long as a training: the handle on the policy, alarm, traces and the last rollout."""

    _use_replay: bool
    _attached_replay: RouterReplay | None = None
    _alarm: Alarm | None = None
    _tracer: Tracer | None = None
    _rollout: Rollout | None = None

    def _attach(self, only_with_weights: bool = False) -> None:
        self._detach()
        model = self.accelerator.unwrap_model(self.model)

        def attach() -> None:
            refuse_dense(model)
            if not only_with_weights or input_device(model) is not None:
                self._attached_replay = RouterReplay(model, self.args.routing_replay_gating)

        make_together(self.accelerator, attach)

    def _detach(self) -> None:
        if self._attached_replay is not None:
            self._attached_replay.remove()
        self._attached_replay = self._alarm = self._tracer = None
        if self._rollout is not None:
            self._rollout.remove_files()

    def _prepare_for_training(self, *args, **kwargs):
        """Of Transformers, when weights are sharded and kernels replaced: here the routers are as they will train."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._use_replay:
            self._attach()
            layout, action = self.routing_replay.layout, self.args.routing_replay_alarm
            self._alarm = Alarm(layout, action, judges=self._has_foreign_records)
            self._tracer = Tracer(self)
        return prepared

    @property
    def routing_replay(self) -> RouterReplay:
        """The handle on the policy, while it trains."""
        if self._attached_replay is None:
            raise RuntimeError("routing replay is attached to the policy only while `train()` runs. Call it inside.")
        return self._attached_replay

    @property
    def _has_foreign_records(self) -> bool:
        foreign = self.use_vllm or getattr(self, "rollout_func", None) is not None
        return foreign and self.args.routing_replay_mode == "R3"

    def train(self, *args, **kwargs):
        """`train` of TRL. The model is attached when it has been prepared, and given back as it was."""
        self._last_compared, self._rollout = None, None
        try:
            return super().train(*args, **kwargs)
        finally:
            self._detach()
