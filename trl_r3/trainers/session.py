"""What a trainer remembers while it replays, and how a pass over its rollout is scored.

Legend: B batch, T tokens of a padded sequence, C completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._compat import adapters_are_off, forget_buffered_inputs
from ..engines.continuous_batching import recorded_batches
from ..engines.generate import recorded_generate
from ..engines.known_routes import KnownRoutes
from ..engines.rollout_func import masks_from_func, records_from_func
from ..engines.turns import MakeTurn, Prompts, RolloutRecord, stitch
from ..engines.vllm_colocate import recorded_llm
from ..engines.vllm_server import recorded_server
from ..masks.masked_batch import MaskedBatch
from ..masks.restricted_head import restricted_head
from ..records.samples import CheckedTokens, Sample, ScoredBatch
from ..records.unpadded_rows import recorded_rows
from .attaching import Attachment, ReplayingTrainer
from .load_log import LoadLog
from .log import ReplayLog, counted_tokens, make_together, raise_together, sampled_logprobs, samples_another
from .rollout import KeptRollouts, Rollout, Scoring, Turns, note_rows_that_matter
from .tracer import Tracer

Scored = TypeVar("Scored")  # what a forward of TRL returns
Scores = tuple[Tensor, Tensor | None]  # (B, C) log-probabilities and entropies


class ReplaySession:
    """
    The state of a trainer that replays, behind its one attribute.

    Args:
        trainer ([`ReplayingTrainer`]):
            The trainer.
        routes, masks (`bool`):
            What is replayed: experts, the tokens that sampling kept, or both.
        earlier (`int`, *optional*, defaults to `0`):
            Batches before the present one whose rollouts are kept.
    """

    def __init__(self, trainer: ReplayingTrainer, routes: bool, masks: bool, earlier: int = 0):
        self.trainer, self.routes, self.masks = trainer, routes, masks
        self.attachment = Attachment(trainer)
        self.rollouts, self.evaluates = KeptRollouts(earlier), False
        self._start()

    def _start(self) -> None:
        self.log = ReplayLog(self.trainer.accelerator)
        self.loads: LoadLog | None = None
        self.tracer: Tracer | None = None
        self.turns = Turns()
        self.scoring: Scoring | None = None
        self._last_compared: int | None = None  # step

    def attach(self) -> None:
        """When the policy has been prepared for training."""
        self.attachment.attach(judges=self.captures and (self.trainer.use_vllm or self._has_rollout_func))
        if every := self.trainer.args.routing_replay_load_every:
            self.loads = LoadLog(self.trainer.accelerator, every)
        if self.trainer.args.routing_replay_trace_dir is not None:
            self.tracer = Tracer(self.trainer, self.attachment.replay)

    def end(self) -> None:
        """When training is over, whatever ended it: nothing of a rollout stays, and the next training begins anew."""
        self.attachment.detach()
        self.rollouts.drop()
        forget_buffered_inputs(self.trainer)
        self._start()

    @property
    def rollout(self) -> Rollout | None:
        """The last one."""
        return self.rollouts.last

    @property
    def captures(self) -> bool:
        """Whether the engine records routes: R2 needs none of the rollout."""
        return self.routes and self.trainer.args.routing_replay_mode == "R3"

    @property
    def _has_rollout_func(self) -> bool:
        return getattr(self.trainer, "rollout_func", None) is not None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Let everything inside be TRL's: what a step does must not hang on the mode that a model was left in."""
        before, self.evaluates = self.evaluates, True
        try:
            with self.scores(None):  # a reward function may evaluate, in the midst of what scores a rollout
                yield
        finally:
            self.evaluates = before

    @contextmanager
    def scores(self, scoring: Scoring | None) -> Iterator[None]:
        """Let the passes inside be about these samples, or about none."""
        before, self.scoring = self.scoring, scoring
        try:
            yield
        finally:
            self.scoring = before

    def begin_turns(self) -> None:
        """Before the engine is asked for the first turn of a rollout, or of a piece of one."""
        goes_on = getattr(self.trainer, "tools", None) or self._has_rollout_func
        self.turns = Turns(KnownRoutes() if goes_on else None)

    def recorded_turn(self) -> AbstractContextManager[MakeTurn]:
        """Record one call of the engine, whichever it is."""
        trainer, replay = self.trainer, self.attachment.replay if self.captures else None
        if trainer.use_vllm:
            layout = None if replay is None else replay.layout
            by_vllm = recorded_server if trainer.args.vllm_mode == "server" else recorded_llm
            return by_vllm(trainer, layout, self.masks, self.turns.known)
        batches = getattr(trainer.args, "use_transformers_continuous_batching", False)  # which students have not
        by_model = recorded_batches if batches else recorded_generate
        return by_model(trainer, replay, self.masks)

    def end_rollout(self, prompt_ids: Prompts, completion_ids: Prompts, own: dict[str, Any] | None) -> None:
        """
        Join the turns to samples, or raise on all processes what any of them has to raise.

        Args:
            prompt_ids, completion_ids (sequence of `list[int]`):
                What will be scored.
            own (dict of `str`, *optional*):
                `routed_experts` and `sampling_masks` of a `rollout_func`.
        """
        accelerator = self.trainer.accelerator
        record = make_together(accelerator, lambda: self._join(prompt_ids, completion_ids, own), self.turns.error)
        self.turns = Turns()
        rollout = self.rollouts.add(record, prompt_ids, completion_ids, self.trainer.state.global_step)
        del record  # what is put into files does not stay in memory
        self._spill()
        assert self.scoring is not None  # TRL generates inside of what scores
        self.scoring.samples = rollout.samples

    def _spill(self) -> None:
        folder = self.trainer.args.routing_replay_spill_dir
        if folder is not None and self.rollout is not None:
            raise_together(self.trainer.accelerator, self.rollout.spill(folder))

    def _join(self, prompt_ids: Prompts, completion_ids: Prompts, own: dict[str, Any] | None) -> RolloutRecord:
        layout = self.attachment.replay.layout if self.captures else None
        if own is None:
            return stitch(self.turns.made, prompt_ids, completion_ids, layout)
        records, masks = [torch.empty(0, device="cpu")] * len(prompt_ids), None
        if layout is not None:
            records = records_from_func(own["routed_experts"], prompt_ids, completion_ids, layout)
        if self.masks:
            masks = masks_from_func(own["sampling_masks"], completion_ids)
        return RolloutRecord([len(ids) for ids in prompt_ids], records, None, masks)

    def score(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, score: Callable[[], Scores]
    ) -> Scores:
        """
        Run one pass of TRL over the samples that are scored.

        Args:
            model (`torch.nn.Module`):
                What scores: the policy, or the reference.
            input_ids, attention_mask (`torch.Tensor` of shape `(B, T)`), logits_to_keep (`int`):
                The batch, and C.
            score (`Callable`):
                TRL's own pass.

        Returns:
            What `score` returned.
        """
        scoring = self.scoring
        assert scoring is not None  # the caller has looked
        is_policy = (scoring.is_update and torch.is_grad_enabled()) or not self._is_reference(model)
        replays = self.routes and is_policy and not scoring.goes_live
        if not replays and not self.masks:
            return score()
        mask = attention_mask if replays and self.attachment.replay.padding is not None else None
        checked = CheckedTokens(scoring.samples, input_ids, input_ids.size(1) - logits_to_keep, mask)
        if not (scoring.is_update or scoring.goes_live):  # the loss is not known yet, what TRL cuts out is
            note_rows_that_matter(scoring.samples, attention_mask[:, checked.prompt_width :])
        head: AbstractContextManager = nullcontext()
        if self.masks:
            head = restricted_head(model, MaskedBatch(scoring.samples, checked.prompt_width, checked))
        with head:
            result = self._route(scoring, checked, score) if replays else score()
        if is_policy and not scoring.is_update:
            scoring.old_logprobs = result[0]
        elif scoring.batch is not None and not scoring.has_old_policy and self._is_fresh(scoring.samples):
            self.log_mismatch(scoring.batch, scoring.samples, result[0].detach())
        return result

    def follow(
        self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, forward: Callable[[], Scored]
    ) -> Scored:
        """
        Run one forward of a student over the samples that are scored.

        Its teacher may be the same module, so the pass tells, not the module: what builds no graph in an update is
        the teacher's, and routes live.

        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(B, T)`), logits_to_keep (`int`):
                The batch, and C.
            forward (`Callable`):
                TRL's own forward.

        Returns:
            What `forward` returned.
        """
        scoring = self.scoring
        if scoring is None or not (torch.is_grad_enabled() or (scoring.samples and not scoring.is_update)):
            return forward()
        checked = CheckedTokens(scoring.samples, input_ids, input_ids.size(1) - logits_to_keep)
        if not scoring.is_update:
            note_rows_that_matter(scoring.samples, attention_mask[:, checked.prompt_width :])
        return self._route(scoring, checked, forward)

    def _route(self, scoring: Scoring, checked: CheckedTokens, score: Callable[[], Scored]) -> Scored:
        """A pass of the policy: through the recorded experts, or R2's, whose updates replay its own."""
        return (self._replay if self.captures or scoring.is_update else self._record)(scoring, checked, score)

    def _replay(self, scoring: Scoring, checked: CheckedTokens, score: Callable[[], Scored]) -> Scored:
        replay, alarm, shift = self.attachment.replay, self.attachment.alarm, self.attachment.shift
        assert alarm is not None  # attached
        judged = self.captures and scoring.has_old_policy
        at_rollout = not scoring.is_update or (self._is_fresh(scoring.samples) and not judged)
        observes = at_rollout or (self.loads is not None and self.loads.follows)
        batch = ScoredBatch(scoring.samples, checked.prompt_width, replay.layout, observes, checked)
        source = batch if self.tracer is None else self.tracer.source(batch, scoring)
        with replay.replay_from(source) as stats:
            if shift is not None:
                shift.ask(stats, scoring)
            result = score()
        batch.check_done()
        if shift is not None:
            shift.see(stats, scoring, checked.prompt_width, self.log)
        if scoring.is_update:
            self.log.add_replay(stats, batch)
            if self.loads is not None:
                self.loads.look(batch.observations, scoring.samples, self.trainer.state.global_step, self.log)
        if at_rollout:
            scoring.verdict = alarm.look(batch.observations)
            if scoring.verdict is not None:
                self.log.add_verdict(scoring.verdict)
        # where samples are kept, those of another process may all be fresh
        if scoring.is_update and (at_rollout or (self.rollouts.earlier and not judged)):
            raise_together(self.trainer.accelerator, alarm.judge())
        if self.tracer is not None:
            assert isinstance(result, tuple)  # of a trainer that writes traces
            self.tracer.scored(source, stats, result[0], scoring.verdict)
        return result

    def _is_fresh(self, samples: list[Sample]) -> bool:
        """Whether no update has happened since any of them was sampled."""
        return all(sample.step == self.trainer.state.global_step for sample in samples)

    def _record(self, scoring: Scoring, checked: CheckedTokens, score: Callable[[], Scored]) -> Scored:
        with self.attachment.replay.record() as recorded:
            result = score()
        samples, layout = scoring.samples, self.attachment.replay.layout
        rows = recorded_rows(recorded.forwards, recorded.positions, samples, checked.prompt_width, layout)
        for sample, record in zip(samples, rows, strict=True):
            sample.record = record
        self._spill()
        return result

    def _is_reference(self, model: Any) -> bool:
        # with PEFT the reference is the policy's own module, so the pass tells, not the module
        return model is self.trainer.ref_model or adapters_are_off(self.trainer.accelerator.unwrap_model(model))

    def compare_is_due(self) -> bool:
        """Whether this rollout is to be scored once more, with live routing."""
        every, step = self.trainer.args.routing_replay_compare_every, self.trainer.state.global_step
        due = self.routes and every > 0 and (self._last_compared is None or step - self._last_compared >= every)
        if due:
            self._last_compared = step
        return due

    def rollout_logprobs(self, batch: dict[str, Any], samples: list[Sample]) -> Tensor | None:
        """(B, C) log-probabilities that the rollout sampled with, where they are over the tokens of training."""
        if samples_another(self.trainer.args, self.masks):
            return None  # which would look like mismatch
        return sampled_logprobs(batch, samples)

    def log_mismatch(
        self, batch: dict[str, Any], samples: list[Sample], train_logprobs: Tensor, prefix: str = "sampling"
    ) -> None:
        """Log rollout against training, at weights that have not changed since the rollout."""
        rollout_logprobs = self.rollout_logprobs(batch, samples)
        if rollout_logprobs is not None:
            self.log.add_mismatch(train_logprobs, rollout_logprobs, counted_tokens(batch), prefix)
