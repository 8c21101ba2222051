"""
What sampling masks add to TRL's trainers: training over the tokens that truncated sampling left.

Legend: B batch, C completion tokens.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from .._compat import adapters_are_off, extra_fields, swapped
from ..engines.continuous_batching import recordable_config
from ..engines.mask_capture import capture_masks, masks_of_func
from ..engines.turns import RolloutRecord, Turn, stitch
from ..engines.vllm_engine import masking_vllm
from ..records.masked_batch import MaskedBatch
from .construction import check_mask_setup
from .log import ReplayLogMixin
from .restricted_head import restricted_head
from .rollout import Rollout, Scoring, tokens_of_turn
from .together import make_together


class SamplingMaskMixin(ReplayLogMixin):
    """
    Sampling masks for a trainer of the GRPO family, below routing replay and independent of it.

    What the sampler kept is recorded a token, and a tensor of identities travels with TRL's own batch. Each pass over
    these tokens, that of the reference policy, too, scores over what was kept; evaluation over the whole vocabulary.
    """

    _evaluates: bool
    _use_replay: bool

    def __init__(self, *args, **kwargs):
        config: Any = kwargs.get("args") or next(
            (arg for arg in args if hasattr(arg, "use_sampling_mask_replay")), None
        )
        self._use_masks = bool(getattr(config, "use_sampling_mask_replay", False))
        self._mask_turns: list[Turn] = []
        self._mask_error: Exception | None = None
        self._mask_rollout: Rollout | None = None
        self._masked: Scoring | None = None
        if self._use_masks:
            check_mask_setup(config)
        with masking_vllm(config) if self._use_masks and config.use_vllm else nullcontext():
            super().__init__(*args, **kwargs)
        if self._use_masks and self.continuous_batching_config is not None:
            recordable_config(self.continuous_batching_config)
        elif not self._use_masks:
            self._warn_of_truncation()

    def _warn_of_truncation(self) -> None:
        named = self._truncation()
        if not named:
            return
        effect = ", so that every importance ratio is off, and `sampling/*` is not logged" if self.use_vllm else ""
        warnings.warn(
            f"{named} cuts the distribution that rollouts are drawn from, but training normalises over the whole "
            f"vocabulary{effect}. Set `use_sampling_mask_replay=True` to train over the tokens that were kept, or "
            "`top_p=1.0`, `top_k=0` and `min_p=None`.",
            RuntimeWarning,
            stacklevel=2,
        )

    @property
    def _masks_now(self) -> bool:
        return self._use_masks and not self._evaluates

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if not self._masks_now:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        with capture_masks(self) as make_turn:
            generated = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        try:
            self._mask_turns.append(make_turn(*tokens_of_turn(prompt_ids, generated)))
        except (RuntimeError, ValueError) as error:
            self._mask_error = self._mask_error or error  # raised when all processes have gathered lengths
        return generated

    def _add_masks(self, turn: Turn) -> None:
        """Give what was kept to a turn that the caller joins itself."""
        if self._mask_turns:
            masked = self._mask_turns.pop()
            turn.masks, turn.logprobs = masked.masks, masked.logprobs or turn.logprobs

    def _generate(self, prompts):
        self._mask_turns, self._mask_error = [], None
        try:
            output = super()._generate(prompts)
            fields = extra_fields(output) if getattr(self, "rollout_func", None) is not None else None
            masks = None if fields is None else fields.pop("sampling_masks", None)  # no business of reward functions
            if not self._masks_now:
                return output
            record = make_together(
                self.accelerator, lambda: self._join_masks(fields, masks, output[0], output[1]), self._mask_error
            )
        finally:
            self._mask_turns, self._mask_error = [], None
        assert self._masked is not None
        step = self.state.global_step
        self._mask_rollout = Rollout.after(self._mask_rollout, record, output[0], output[1], step=step)
        self._masked.samples = self._mask_rollout.samples
        return output

    def _join_masks(self, fields: dict | None, masks: Any, prompt_ids: list, completion_ids: list) -> RolloutRecord:
        if fields is None:
            return stitch(self._mask_turns, prompt_ids, completion_ids, None)
        return masks_of_func(masks, prompt_ids, completion_ids)

    def _generate_and_score_completions(self, inputs):
        if not self._masks_now:
            return super()._generate_and_score_completions(inputs)
        scoring = Scoring()
        with swapped(self, "_masked", scoring):
            output = super()._generate_and_score_completions(inputs)
        rollout = self._mask_rollout
        assert rollout is not None  # `_generate` has run
        output["masked_samples"] = rollout.identities(output["completion_ids"].device)
        if rollout.logprobs is not None:
            output["rollout_logprobs"] = self._padded_like(rollout.logprobs, output["completion_ids"])
        if not self._use_replay:  # which logs it itself
            self._log_mismatch(output, scoring.old_logprobs)
        return output

    def _score_live(self, output: dict[str, Any]) -> Tensor:
        if not self._masks_now or self._mask_rollout is None:
            return super()._score_live(output)
        with swapped(self, "_masked", Scoring(self._mask_rollout.samples)):  # what is compared is the routing
            return super()._score_live(output)

    def _compute_loss(self, model, inputs):
        if not self._masks_now:
            return super()._compute_loss(model, inputs)
        if "masked_samples" not in inputs:
            raise RuntimeError(
                f"the batch of an update has no `masked_samples` among {sorted(inputs)}, so its sampling masks are "
                "unknown. Keep this tensor with the others, and index it as they are indexed."
            )
        if self._mask_rollout is None:
            raise RuntimeError("an update came before any rollout, so there is no sampling mask to replay.")
        samples = self._mask_rollout.of_identities(inputs["masked_samples"].tolist())
        with swapped(self, "_masked", Scoring(samples, inputs)):
            return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        scoring = self._masked
        if scoring is None:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        with restricted_head(model, MaskedBatch(scoring.samples, input_ids.size(1) - logits_to_keep)):
            result = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        if scoring.inputs is None:
            if not self._is_reference(model):
                scoring.old_logprobs = result[0]
        elif not self._use_replay and not scoring.has_old_policy:  # no update has happened since the rollout
            self._log_mismatch(scoring.inputs, result[0].detach())
        return result

    def _is_reference(self, model) -> bool:
        # with PEFT the reference is the policy's own module, so the pass tells, not the module
        return model is self.ref_model or adapters_are_off(self.accelerator.unwrap_model(model))
