"""What replay adds to TRL's trainers of the GRPO family: a delta. What is not overridden here is left to TRL."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from .._compat import buffered_inputs, extra_fields
from ..engines.turns import Turn
from ..engines.weight_sync import keep_base
from ..records.samples import Sample
from ..routers.passes import TrainingGuard
from ..routers.router_replay import RouterReplay
from .checkpoints import whole_checkpoint
from .construction import (
    check_generation,
    check_parent,
    check_setup,
    check_shards,
    config_from,
    recording_engine,
    warn_if_off,
)
from .live_comparison import compare_with_live
from .log import counted_tokens, raise_together, warn_of_truncation
from .rollout import note_rows_that_matter
from .session import ReplaySession, Scoring

if TYPE_CHECKING:
    from trl import GRPOTrainer

    class _Trainer(GRPOTrainer):  # what GRPOTrainer sets without annotating it
        args: Any
        model: Any
        use_vllm: bool
        vllm_mode: str
        vllm_generation: Any
        use_transformers_continuous_batching: bool
        temperature: float
        top_p: float
        top_k: int
        min_p: float | None
else:
    _Trainer = object


class RoutingReplayMixin(_Trainer):
    """
    Routing replay and sampling masks for a trainer of the GRPO family.

    What the sampler decided is recorded by rollout, and one tensor of identities, `rollout_samples`, travels with
    TRL's own batch and says which sample is where. Each pass of the policy over them replays the experts; each pass,
    that of the reference policy, too, scores over the tokens that were kept. The reference policy, reward models and
    evaluation route live.
    """

    kept_rollouts: int = 0
    """Earlier batches whose samples can still be trained on, for a subclass with a replay buffer: their records stay
    in memory, or in files, until so many batches have been rolled out after them."""

    _r3: ReplaySession | None = None  # where nothing is replayed the trainer is TRL's

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

    def __init__(self, *args, **kwargs):
        check_parent(type(self), RoutingReplayMixin)
        config = config_from(args, kwargs)
        routes = bool(getattr(config, "use_routing_replay", False))
        masks = bool(getattr(config, "use_sampling_mask_replay", False))
        check_setup(config, kwargs.get("model", args[0] if args else None), routes, masks)
        with recording_engine(config, routes, masks):
            super().__init__(*args, **kwargs)
        if self.use_vllm:
            keep_base(self.vllm_generation)
        if not masks:
            warn_of_truncation(self)
        if not routes and not masks:
            warn_if_off(type(self), config)
            return
        check_generation(self, routes)
        session = ReplaySession(self, routes, masks, self.kept_rollouts)
        if routes:
            check_shards(self.accelerator)
            session.attachment.try_on()
        self._r3 = session

    @property
    def routing_replay(self) -> RouterReplay:
        """
        The handle on the policy, while it trains. Before and after `train()` it is one that was removed: it says which
        routers there are (`layout`) and replays nothing.
        """
        if self._r3 is None or not self._r3.routes:
            raise RuntimeError("this trainer does not replay routes. Set `use_routing_replay=True`.")
        return self._r3.attachment.handle

    @property
    def rollout_samples(self) -> list[Sample]:
        """The samples of the batch that is trained on, each with its tokens, record and sampling mask."""
        return [] if self._r3 is None else self._r3.rollouts.samples

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
        assert self._r3 is not None  # it has the handle
        with self._r3.scores(None), guard.live_on_purpose():
            yield

    def rollout_turn(self, prompt_ids: list[list[int]]) -> tuple[Turn, list | None]:
        """
        Generate one turn with the configured engine, for use in a `rollout_func`.

        Args:
            prompt_ids (list of `list[int]`):
                Prompts, one a completion.

        Returns:
            `tuple[Turn, list]`: The turn with its records and masks (join turns with [`stitch`]), and the sampled
            tokens' log-probabilities. In evaluation there are no records, and no log-probabilities where TRL has none.
        """
        completion_ids, logprobs = self._generate_single_turn(prompt_ids, None, {}, 1)
        made = self._r3.turns.made if self._r3 is not None else []
        turn = made.pop() if made else Turn(prompt_ids, completion_ids, [])
        if logprobs is None and turn.logprobs is not None:
            logprobs = [values.tolist() for values in turn.logprobs]
        return turn, logprobs

    def train(self, *args, **kwargs):
        """`train` of TRL. The model is attached when it has been prepared, and given back as it was."""
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

    def training_step(self, *args, **kwargs):
        """`training_step` of TRL: each of its forwards that builds a graph replays, and one of them at least."""
        if self._r3 is None:
            return super().training_step(*args, **kwargs)
        with ExitStack() as stack:
            if self._r3.routes:
                stack.enter_context(self._r3.attachment.training_step(self._r3.log))
            loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:  # of all processes
            self._r3.log.meet()
        return loss

    def prediction_step(self, *args, **kwargs):
        """`prediction_step` of TRL: evaluation routes live."""
        if self._r3 is None:
            return super().prediction_step(*args, **kwargs)
        with self._r3.evaluating():
            return super().prediction_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`log` of TRL, with the shares that have come together."""
        if self._r3 is not None and not any(name.startswith("eval_") for name in logs):
            logs.update(self._r3.log.collect())  # type: ignore[arg-type]
        super().log(logs, start_time)

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if self._r3 is None or self._r3.evaluates:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        images = args[0] if args else kwargs.get("images")
        if self.use_vllm and self._r3.captures and images is not None and any(images):
            raise ValueError(
                "vLLM expands image placeholders itself, so that its rows would not be those of the training tokens. "
                "Generate with Transformers (`use_vllm=False`), leave images out, or set `use_routing_replay=False`."
            )
        with self._r3.recorded_turn() as make_turn:
            generated = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self._r3.turns.add(make_turn, prompt_ids, generated)
        return generated

    def _prepare_inputs(self, generation_batch):
        """Of TRL, which rolls out once for the updates that follow; a subclass may do so until it has enough."""
        if self._r3 is None or self._r3.evaluates:
            return super()._prepare_inputs(generation_batch)
        with self._r3.rollouts.one_batch():
            inputs = super()._prepare_inputs(generation_batch)
        self._r3.rollouts.keep_only(buffered_inputs(self))
        return inputs

    def _generate(self, prompts):
        if self._r3 is not None:
            self._r3.begin_turns()
        output = super()._generate(prompts)
        own = None
        if getattr(self, "rollout_func", None) is not None:  # these are no business of reward functions
            own = {name: extra_fields(output).pop(name, None) for name in ("routed_experts", "sampling_masks")}
        if self._r3 is not None and not self._r3.evaluates:
            self._r3.end_rollout(output[0], output[1], own)
        return output

    def _generate_and_score_completions(self, inputs):
        r3 = self._r3
        if r3 is None or r3.evaluates:
            return super()._generate_and_score_completions(inputs)
        r3.rollouts.begin()
        if r3.tracer is not None:
            r3.tracer.begin()
        scoring = Scoring()
        with ExitStack() as stack:
            stack.enter_context(r3.scores(scoring))
            if r3.routes:  # reward functions may do what they like with the policy: this is no update
                stack.enter_context(r3.attachment.replay.guarded(None))
            output = super()._generate_and_score_completions(inputs)
        rollout = r3.rollout
        assert rollout is not None  # `_generate` has run
        output["rollout_samples"] = rollout.identities(output["completion_ids"].device)
        note_rows_that_matter(rollout.samples, counted_tokens(output))
        self._check_rollout()
        if scoring.old_logprobs is not None:
            r3.log_mismatch(output, rollout.samples, scoring.old_logprobs)
        live = compare_with_live(self, r3, output, scoring.old_logprobs) if r3.compare_is_due() else None
        if r3.tracer is not None:
            r3.tracer.rolled_out(rollout.samples, output, r3.rollout_logprobs(output, rollout.samples), scoring, live)
        return output

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

    def _compute_loss(self, model, inputs):
        r3 = self._r3
        if r3 is None or r3.evaluates:
            return super()._compute_loss(model, inputs)
        if "rollout_samples" not in inputs:
            raise RuntimeError(
                f"the batch of an update has no `rollout_samples` among {sorted(inputs)}, so what was recorded of its "
                "samples is unknown. Keep this tensor with the others, and index it as they are indexed."
            )
        if r3.rollout is None:
            raise RuntimeError("an update came before any rollout, so there is no record to replay.")
        samples = r3.rollouts.get_samples(inputs["rollout_samples"].tolist())
        with r3.scores(Scoring(samples, inputs)):
            return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        def score():
            return super(RoutingReplayMixin, self)._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )

        if self._r3 is None or self._r3.scoring is None:
            return score()
        return self._r3.score(model, input_ids, attention_mask, logits_to_keep, score)
