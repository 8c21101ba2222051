"""What routing replay adds to TRL's trainers. What is not overridden here is left to TRL.

Legend: B batch, C completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from .._compat import extra_fields, swapped
from ..engines.capture import capture, rollout_of_func
from ..engines.continuous_batching import recordable_config
from ..engines.generate_settings import check_decoding
from ..engines.known_routes import KnownRoutes
from ..engines.turns import RolloutRecord, Turn, stitch
from ..engines.vllm_engine import capturing_vllm
from ..records.samples import ScoredBatch
from ..records.storage import slice_samples
from .construction import check_parent, check_setup, check_shards
from .guarded_steps import GuardedStepsMixin
from .log import ReplayLogMixin
from .rollout import Rollout, Scoring, tokens_of_turn
from .sampling_masks import SamplingMaskMixin
from .together import make_together, raise_together


class RoutingReplayMixin(GuardedStepsMixin, SamplingMaskMixin):
    """
    Routing replay for a trainer of the GRPO family: a delta of the passes that generate and score.

    Rollouts are recorded and kept, one record a sample; a tensor of identities travels with TRL's own batch and says
    which sample is where. Each pass of the policy over them replays; the reference policy, reward models and
    evaluation route live.
    """

    def __init__(self, *args, **kwargs):
        check_parent(type(self), ReplayLogMixin)
        self._evaluates = False
        self._turns: list[Turn] = []
        self._known_routes = KnownRoutes()
        self._rollout_error: Exception | None = None
        self._scoring: Scoring | None = None
        config: Any = kwargs.get("args") or next((arg for arg in args if hasattr(arg, "use_routing_replay")), None)
        self._use_replay = bool(getattr(config, "use_routing_replay", False))
        if self._use_replay:
            check_setup(config, kwargs.get("model", args[0] if args else None))
        asks_vllm = self._use_replay and config.use_vllm and config.routing_replay_mode == "R3"
        with capturing_vllm(config) if asks_vllm else nullcontext():
            super().__init__(*args, **kwargs)
        if self._use_replay:
            check_shards(self.accelerator)
            if self.continuous_batching_config is not None:
                recordable_config(self.continuous_batching_config)
            elif not self.use_vllm:
                check_decoding(self.model, {"generation_config": self.generation_config})
            try:  # unsupported models fail now, not at the first step; ZeRO-3 and FSDP may load weights later
                self._attach(only_with_weights=True)
            finally:
                self._detach()

    def prediction_step(self, *args, **kwargs):
        """`prediction_step` of TRL: evaluation routes live."""
        with swapped(self, "_evaluates", True):
            return super().prediction_step(*args, **kwargs)

    @property
    def _replays_now(self) -> bool:
        # what a step does must not hang on the mode that somebody left the model in
        return self._use_replay and not self._evaluates

    @property
    def _captures(self) -> bool:
        # R2 needs no routes of the rollout; where Transformers generates, the capture also gives the log-probabilities
        by_transformers = not self.use_vllm and getattr(self, "rollout_func", None) is None
        return self.args.routing_replay_mode == "R3" or by_transformers

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if not self._replays_now or not self._captures:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        images = args[0] if args else kwargs.get("images")
        if self.use_vllm and images is not None and any(images):
            raise ValueError(
                "vLLM expands image placeholders itself, so that its rows would not be those of the training tokens. "
                "Generate with Transformers (`use_vllm=False`), leave images out, or set `use_routing_replay=False`."
            )
        with capture(self, self.routing_replay, self._known_routes) as make_turn:
            generated = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        try:
            self._turns.append(make_turn(*tokens_of_turn(prompt_ids, generated)))
        except (RuntimeError, ValueError) as error:
            # other processes go on to meet this one where TRL gathers lengths: raised when that is over
            self._rollout_error = self._rollout_error or error
        return generated

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
        turn = self._turns.pop() if self._turns else Turn(prompt_ids, completion_ids, [])
        self._add_masks(turn)
        if logprobs is None and turn.logprobs is not None:
            logprobs = [values.tolist() for values in turn.logprobs]
        return turn, logprobs

    def _generate(self, prompts):
        self._turns, self._rollout_error, self._known_routes = [], None, KnownRoutes()
        if self._replays_now and self._rollout is not None:
            self._rollout.release()
        try:
            output = super()._generate(prompts)
            fields = extra_fields(output) if getattr(self, "rollout_func", None) is not None else None
            routes = None if fields is None else fields.pop("routed_experts", None)  # no business of reward functions
            if not self._replays_now:
                return output
            record = make_together(
                self.accelerator, lambda: self._join(fields, routes, output[0], output[1]), self._rollout_error
            )
        finally:
            self._turns, self._rollout_error, self._known_routes = [], None, KnownRoutes()
        assert self._scoring is not None
        self._rollout = Rollout.after(self._rollout, record, output[0], output[1], step=self.state.global_step)
        del record  # what is put into files does not stay in memory
        self._spill()
        self._scoring.samples = self._rollout.samples
        return output

    def _spill(self) -> None:
        if self.args.routing_replay_spill_dir is not None and self._rollout is not None:
            raise_together(self.accelerator, self._rollout.spill(self.args.routing_replay_spill_dir))

    def _join(self, fields: dict | None, routes: Any, prompt_ids: list, completion_ids: list) -> RolloutRecord:
        layout = self.routing_replay.layout
        if fields is None or not self._captures:
            return stitch(self._turns, prompt_ids, completion_ids, layout)
        return rollout_of_func(routes, prompt_ids, completion_ids, layout)

    def _generate_and_score_completions(self, inputs):
        if not self._replays_now:
            return super()._generate_and_score_completions(inputs)
        assert self._tracer is not None  # attached
        self._tracer.begin()
        # reward functions may do what they like with the policy: this is no update
        with self._scores(Scoring()) as scoring, swapped(self.routing_replay, "guard", None):
            output = super()._generate_and_score_completions(inputs)
            rollout = self._rollout
            assert rollout is not None  # `_generate` has run
            output["routed_samples"] = rollout.identities(output["completion_ids"].device)
            rollout.count_rows_that_matter(output)
            if rollout.logprobs is not None:
                # those over kept tokens are there, where sampling masks are replayed
                output.setdefault("rollout_logprobs", self._padded_like(rollout.logprobs, output["completion_ids"]))
            self._check_rollout(rollout, scoring)
            self._log_mismatch(output, scoring.old_logprobs)
        live_logprobs = None
        if self._compare_is_due():
            live_logprobs = self._score_live(output)
            self._log_mismatch(output, live_logprobs, prefix="sampling/live")
            self._warn_if_worse(output, scoring.old_logprobs, live_logprobs)
        self._tracer.rolled_out(rollout.samples, output, scoring.old_logprobs, live_logprobs)
        return output

    def _check_rollout(self, rollout: Rollout, scoring: Scoring) -> None:
        """Refuse a rollout that lacks records, or whose records belong elsewhere, on all processes at once."""
        assert self._alarm is not None  # attached
        error: Exception | None = None
        if self._captures:
            error = rollout.refuse_missing(self.routing_replay.layout, self.args.routing_replay_max_missing)
        if error is None and scoring.batch is not None:
            error = self._alarm.check(scoring.batch.observations, self._add_share)
        raise_together(self.accelerator, error)

    def _compute_loss(self, model, inputs):
        if not self._replays_now:
            return super()._compute_loss(model, inputs)
        if "routed_samples" not in inputs:
            raise RuntimeError(
                f"the batch of an update has no `routed_samples` among {sorted(inputs)}, so its records are unknown. "
                "Keep this tensor with the others, and index it as they are indexed."
            )
        if self._rollout is None:
            raise RuntimeError("an update came before any rollout, so there is no record to replay.")
        samples = self._rollout.of_identities(inputs["routed_samples"].tolist())
        with self._scores(Scoring(samples, inputs)):
            return super()._compute_loss(model, inputs)

    @contextmanager
    def _scores(self, scoring: Scoring) -> Iterator[Scoring]:
        with swapped(self, "_scoring", scoring):
            yield scoring

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        def score():
            return super(RoutingReplayMixin, self)._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )

        scoring = self._scoring
        if scoring is None or (scoring.inputs is None and self._is_reference(model)):
            return score()
        prompt_width = input_ids.size(1) - logits_to_keep
        if self.args.routing_replay_mode == "R2" and scoring.inputs is None:
            result = self._record_old_policy(score, scoring, prompt_width)
            scoring.old_logprobs = result[0]
            return result
        observes = scoring.inputs is None or self._updates_first(scoring)
        scoring.batch = batch = ScoredBatch(scoring.samples, prompt_width, self.routing_replay.layout, observes)
        batch.check_batch(input_ids)
        assert self._tracer is not None  # attached
        source = self._tracer.source(batch, scoring)
        with self.routing_replay.replay_from(source) as stats:
            result = score()
        batch.check_done()
        if scoring.inputs is None:
            scoring.old_logprobs = result[0]
            self._tracer.scored(source, stats, result[0])
            return result
        self._log_replay(stats, batch)
        if not scoring.has_old_policy:  # no update has happened since the rollout
            self._log_mismatch(scoring.inputs, result[0].detach())
        if observes:
            assert self._alarm is not None  # attached
            raise_together(self.accelerator, self._alarm.check(batch.observations, self._add_share))
        self._tracer.scored(source, stats, result[0])
        return result

    def _updates_first(self, scoring: Scoring) -> bool:
        """Whether an update is at the weights of its rollout, and its record not judged yet."""
        assert self._rollout is not None  # an update follows a rollout
        unjudged = self.args.routing_replay_mode == "R2" or not scoring.has_old_policy
        return unjudged and self._rollout.step == self.state.global_step

    def _record_old_policy(self, score: Callable, scoring: Scoring, prompt_width: int):
        with self.routing_replay.record() as recorded:
            result = score()
        routes = torch.cat(recorded.forwards).cpu()
        prompts = [sample.prompt_length for sample in scoring.samples]
        completions = [len(sample.tokens) - sample.prompt_length for sample in scoring.samples]
        for sample, rows in zip(
            scoring.samples, slice_samples(routes, prompt_width, prompts, completions), strict=True
        ):
            sample.record = rows
        self._spill()
        return result
