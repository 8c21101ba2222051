"""A trainer of TRL that replays, from construction to the end of training, whichever way it rolls out and scores."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from .._compat import buffered_inputs
from ..engines.weight_sync import keep_base
from ..records.samples import Sample
from ..routers.discovery import is_experts
from ..routers.passes import TrainingGuard
from ..routers.router_replay import RouterReplay
from .checkpoints import whole_checkpoint
from .construction import (
    check_compiler,
    check_generation,
    check_setup,
    check_shards,
    check_switches,
    config_from,
    recording_engine,
    warn_if_off,
)
from .deciding_mismatch import DecidingMismatch
from .log import counted_tokens, raise_together
from .rollout import Scoring, note_rows_that_matter
from .session import ReplaySession

_Trainer: Any = object  # one of TRL's, which have no annotated base in common


class AttachedTrainer(_Trainer):
    """A trainer of TRL whose policy replays from when it has been prepared until training is over."""

    _r3: Any = None  # the session; where nothing is replayed the trainer is TRL's

    _paper = {
        "title": "Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers",
        "id": "2510.11370",
        "citation": textwrap.dedent("""\
            @article{ma2025stabilizing,
                title        = {{Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers}},
                author       = {Wenhan Ma and Hailin Zhang and Liang Zhao and Yifan Song and Yudong Wang and
                                Zhifang Sui and Fuli Luo},
                year         = 2025,
                eprint       = {arXiv:2510.11370},
            }"""),
    }

    @property
    def routing_replay(self) -> RouterReplay:
        """
        The handle on the policy, while it trains. Before and after `train()` it is one that was removed: it says which
        routers there are (`layout`) and replays nothing.
        """
        if self._r3 is None or not self._r3.routes:
            raise RuntimeError("this trainer does not replay routes. Set `use_routing_replay=True`.")
        return self._r3.attachment.handle

    def train(self, *args, **kwargs):
        """`train` of TRL. The model is attached when it has been prepared, and given back as it was."""
        check_switches(getattr(self, "args", None), self._r3)  # the config may have been changed since
        if self._r3 is not None:
            self.args.check_replay()
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._r3 is not None:
                self._r3.end()

    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs):
        """Of Transformers, which restores no experts of a full fine-tune."""
        with whole_checkpoint(self, lambda: resume_from_checkpoint):
            return super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_best_model(self):
        """Of Transformers, likewise."""
        with whole_checkpoint(self, lambda: str(self.state.best_model_checkpoint)):
            return super()._load_best_model()

    def _prepare_for_training(self, *args, **kwargs):
        """Of Transformers, when weights are sharded and kernels replaced: here the routers are as they will train."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._r3 is not None and self._r3.routes:
            self._r3.attach()
        return prepared


class ReplayLifecycle(AttachedTrainer):
    """
    What replay needs of any trainer that rolls out: it is attached while the trainer trains, and each step is watched.

    A subclass overrides the methods in which its trainer rolls out ([`ReplayLifecycle._recording_rollout`]), updates
    ([`ReplayLifecycle._replaying_update`]) and scores.
    """

    model: Any  # the policy, which TRL's trainers set

    kept_rollouts: int = 0
    """Earlier batches whose samples can still be trained on, for a subclass with a replay buffer: their records stay
    in memory, or in files, until so many batches have been rolled out after them."""

    _r3: ReplaySession | None = None
    _deciding: DecidingMismatch | None = None

    def __init__(self, *args, **kwargs):
        self._check_parent()
        config = config_from(args, kwargs)
        routes = bool(getattr(config, "use_routing_replay", False))
        masks = bool(getattr(config, "use_sampling_mask_replay", False))
        check_setup(config, kwargs.get("model", args[0] if args else None), routes, masks)
        with recording_engine(config, routes, masks):
            super().__init__(*args, **kwargs)
        if any(is_experts(name) for name, _ in self.model.named_modules()):
            self._deciding = DecidingMismatch()
        if self.use_vllm:
            keep_base(self.vllm_generation)
        self._warn_of_sampling(masks)
        if not routes and not masks:
            warn_if_off(type(self), config)
            return
        check_compiler(self.accelerator, routes)
        check_generation(self, routes)
        session = ReplaySession(self, routes, masks, self.kept_rollouts)
        if routes:
            check_shards(self.accelerator)
            session.attachment.try_on()
        self._r3 = session

    @property
    def rollout_samples(self) -> list[Sample]:
        """The samples of the batch that is trained on, each with its tokens, record and sampling mask."""
        return [] if self._r3 is None else self._r3.rollouts.samples

    @contextmanager
    def live_routing(self) -> Iterator[None]:
        """
        Let forwards of a training step go live on purpose, which is an error elsewhere. Their rows are logged as not
        replayed. Without replay it changes nothing.

        Example:

        ```python
        >>> with trainer.live_routing():
        ...     auxiliary = model(input_ids=other_ids).logits
        ```
        """
        with ExitStack() as stack:
            if self._r3 is not None:  # else all of them are live
                stack.enter_context(self._r3.scores(None))
            if self._r3 is not None and self._r3.routes:
                guard = self.routing_replay.guard or TrainingGuard()
                stack.enter_context(guard.live_on_purpose())
            yield

    def training_step(self, *args, **kwargs):
        """`training_step` of TRL: each of its forwards that builds a graph replays, and one of them at least."""
        if self._r3 is None:
            return super().training_step(*args, **kwargs)
        with ExitStack() as stack:
            stack.enter_context(self._r3.scores(Scoring()))  # of no samples, until the step has its batch
            if self._r3.routes:
                stack.enter_context(self._r3.attachment.training_step(self._r3.log))
            loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:  # of all processes
            self._r3.log.meet()
            if self._r3.loads is not None:
                self._r3.loads.meet()
        return loss

    def evaluate(self, *args, **kwargs):
        """`evaluate` of TRL: its log, whatever its prefix, is none of the training."""
        if self._r3 is None:
            return super().evaluate(*args, **kwargs)
        with self._r3.evaluating():
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, *args, **kwargs):
        """`prediction_step` of TRL: evaluation routes live."""
        if self._r3 is None:
            return super().prediction_step(*args, **kwargs)
        with self._r3.evaluating():
            return super().prediction_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`log` of TRL, with the shares that have come together."""
        if self._r3 is not None and not self._r3.evaluates:
            logs.update(self._r3.log.collect())  # type: ignore[arg-type]
            if self._deciding is not None and ("sampling/live/k3_kl" in logs or not self._r3.captures):
                self._deciding.look_at_log(logs, replays=self._r3.captures)
            if self._r3.loads is not None:
                logs.update(self._r3.loads.collect())
        super().log(logs, start_time)

    def _prepare_inputs(self, generation_batch):
        """Of TRL, which rolls out once for the updates that follow; a subclass may do so until it has enough."""
        if self._r3 is None or self._r3.evaluates:
            return super()._prepare_inputs(generation_batch)
        with self._r3.rollouts.one_batch():
            inputs = super()._prepare_inputs(generation_batch)
        self._r3.rollouts.keep_only(buffered_inputs(self))
        # in a training step: for a loss of one's own, which calls none of the methods that say so again
        if self._r3.scoring is not None and "rollout_samples" in inputs:
            self._r3.scoring = self._scoring_of(inputs)
        return inputs

    def _check_parent(self) -> None:
        """Refuse a class whose parent would call nothing of this one."""

    def _warn_of_sampling(self, masks: bool) -> None:
        """Say what of the sampling settings does not fit the loss, where that depends on them."""

    def _recording_rollout(self, make: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], Scoring]:
        """
        Let a trainer make a rollout and score it, and name its samples in the batch.

        Args:
            make (`Callable`):
                Returns the batch of TRL.

        Returns:
            `tuple[dict, Scoring]`: The batch, and what the passes over it scored.
        """
        r3 = self._r3
        assert r3 is not None  # or nothing is replayed
        r3.rollouts.begin()
        scoring = Scoring()
        with ExitStack() as stack:
            stack.enter_context(r3.scores(scoring))
            if r3.routes:  # reward functions may do what they like with the policy: this is no update
                stack.enter_context(r3.attachment.replay.guarded(None))
            output = make()
        rollout = r3.rollout
        assert rollout is not None  # it has been generated
        output["rollout_samples"] = rollout.identities(output["completion_ids"].device)
        note_rows_that_matter(rollout.samples, counted_tokens(output))
        self._check_rollout()
        return output, scoring

    def _check_rollout(self) -> None:
        """Refuse a rollout that lacks records, or whose records belong elsewhere, on all processes at once."""
        r3 = self._r3
        if r3 is None or not r3.routes or r3.rollout is None:
            return
        error: Exception | None = None
        if r3.captures:
            layout = r3.attachment.replay.layout
            error = r3.rollout.refuse_missing(layout, self.args.routing_replay_max_missing)
        if error is None and r3.attachment.alarm is not None:
            error = r3.attachment.alarm.judge()
        raise_together(self.accelerator, error)
        if r3.loads is not None:
            r3.loads.take(r3.rollout.samples, r3.attachment.replay.layout, self.state.global_step)

    @contextmanager
    def _replaying_update(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Let the passes inside be those of an update on a batch of TRL."""
        assert self._r3 is not None  # or nothing is replayed
        with self._r3.scores(self._scoring_of(inputs)):
            yield

    def _scoring_of(self, inputs: dict[str, Any]) -> Scoring:
        """What passes of an update on a batch of TRL score."""
        r3 = self._r3
        assert r3 is not None  # or nothing is replayed
        if "rollout_samples" not in inputs:
            raise RuntimeError(
                f"the batch of an update has no `rollout_samples` among {sorted(inputs)}, so what was recorded of its "
                "samples is unknown. Keep this tensor with the others, and index it as they are indexed."
            )
        if r3.rollout is None:
            raise RuntimeError("an update came before any rollout, so there is no record to replay.")
        return Scoring(r3.rollouts.get_samples(inputs["rollout_samples"].tolist()), inputs)
