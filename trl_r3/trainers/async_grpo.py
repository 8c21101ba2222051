"""Asynchronous GRPO with Rollout Routing Replay: a delta. What is not overridden here is left to TRL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

from .async_construction import (
    IN_FLIGHT,
    SHARED_ROWS,
    check_async_config,
    check_partitions,
    check_server,
    check_worker,
    warn_of_ratio,
)
from .async_queue import ROW_NUMBER
from .async_session import AsyncReplaySession
from .config import RoutingReplayConfigMixin
from .construction import check_compiler, check_setup, check_shards, config_from, warn_if_off
from .lifecycle import AttachedTrainer
from .log import make_together


@dataclass
class R3AsyncGRPOConfig(RoutingReplayConfigMixin, AsyncGRPOConfig):
    r"""
    Configuration class for the [`R3AsyncGRPOTrainer`]: [`~trl.experimental.async_grpo.AsyncGRPOConfig`] and the fields
    of [`RoutingReplayConfigMixin`]. There is no `"R2"`, no comparison with live routing, no trace, no folder for
    records and no sampling mask.

    Parameters:
        routing_replay_in_flight (`str`, *optional*, defaults to `"replay"`):
            What becomes of requests that were answered across an update of the server's weights. Their routes
            and log-probabilities are in part of the weights before, in part of those behind it: `"replay"` replays
            them, `"live"` lets their rows route live, which counts as missing but is no error.
        routing_replay_padding (`str`, *optional*, defaults to `"keep"`):
            Packed rows have no padding, so there is nothing else.
        routing_replay_shared_rows (`str`, *optional*, defaults to `"first"`):
            What becomes of a token that samples of a packed row share, but with different experts: `"first"` forwards
            it once, with the record of the first of them, `"exact"` once for each record.
    """

    routing_replay_padding: str = field(
        default="keep", metadata={"help": "'keep': packed rows have no padding.", "choices": ["keep"]}
    )
    routing_replay_in_flight: str = field(
        default="replay",
        metadata={
            "help": "What becomes of requests that were answered across an update of the server's weights: 'replay' "
            "replays their routes, 'live' lets their rows route live.",
            "choices": list(IN_FLIGHT),
        },
    )
    routing_replay_shared_rows: str = field(
        default="first",
        metadata={
            "help": "What becomes of a token that samples of a packed row share, but with different experts: 'first' "
            "forwards it once, with the record of the first of them, 'exact' once for each record.",
            "choices": list(SHARED_ROWS),
        },
    )

    def check_replay(self):
        check_async_config(self)


class R3AsyncGRPOTrainer(AttachedTrainer, AsyncGRPOTrainer):
    """
    [`~trl.experimental.async_grpo.AsyncGRPOTrainer`] with Rollout Routing Replay. Arguments are those of the parent.

    With `use_routing_replay=True`, the forward of each packed row goes through the experts that the server used, in
    recomputes and backward as well, also where a sample is of an older policy. A token that several samples share is
    forwarded once, with the record of the first of them, unless records are told apart.

    Args:
        args ([`R3AsyncGRPOConfig`], *optional*):
            Configuration. If `None`, a default one without replay.
        kwargs:
            All other arguments are those of [`~trl.experimental.async_grpo.AsyncGRPOTrainer`].
    """

    _tag_names = ["trl", "async-grpo", "r3"]
    _name = "AsyncGRPO with Rollout Routing Replay (R3)"

    _r3: AsyncReplaySession | None = None

    def __init__(self, *args, **kwargs):
        config: Any = config_from(args, kwargs)
        replays = bool(getattr(config, "use_routing_replay", False))
        check_setup(config, kwargs.get("model", args[0] if args else None), replays, masks=False)
        if replays:
            check_partitions()
        super().__init__(*args, **kwargs)
        if not replays:
            warn_if_off(type(self), config)
            return
        check_shards(self.accelerator)
        check_compiler(self.accelerator, routes=True)
        make_together(self.accelerator, self._check_rollouts)
        session = AsyncReplaySession(self)
        session.attachment.try_on()
        self._r3 = session

    def _check_rollouts(self) -> None:
        """On the main process, which has the worker and asks the server."""
        if self.accelerator.is_main_process:
            model: Any = self.model
            check_worker(self.rollout_worker)
            warn_of_ratio(self.args, check_server(self.vllm_client, model.config._name_or_path))

    def train(self, *args, **kwargs):
        """`train` of TRL, which trains once."""
        if self._r3 is not None:
            self._r3.begin()
        return super().train(*args, **kwargs)

    def get_train_dataloader(self):
        """`get_train_dataloader` of TRL, whose samples and rows come with their records."""
        if self._r3 is None:
            return super().get_train_dataloader()
        with self._r3.packing():
            return super().get_train_dataloader()

    def _sync_weight(self):
        super()._sync_weight()
        if self._r3 is not None:
            self._r3.synced_at = self.state.global_step

    def _sync_weight_merged(self, *args, **kwargs):
        if self._r3 is None:
            return super()._sync_weight_merged(*args, **kwargs)
        with self._r3.keeping_base(), self._r3.counting_first():
            return super()._sync_weight_merged(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """`compute_loss` of TRL, through the record of its packed row."""
        if self._r3 is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with self._r3.replays(int(inputs[ROW_NUMBER][0])):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args, **kwargs):
        """`training_step` of TRL: each of its forwards that builds a graph replays, and one of them at least."""
        if self._r3 is None:
            return super().training_step(*args, **kwargs)
        with self._r3.attachment.training_step(self._r3.log):
            loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:  # of all processes
            self._r3.log.meet()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`log` of TRL, with the shares that have come together."""
        if self._r3 is not None:
            logs.update(self._r3.log.collect())  # type: ignore[arg-type]
        super().log(logs, start_time)
