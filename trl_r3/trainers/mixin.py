"""What replay adds to TRL's trainers of the GRPO family: a delta. What is not overridden here is left to TRL."""

from __future__ import annotations

import torch

from .._compat import extra_fields
from ..engines.turns import Turn
from .construction import check_parent
from .lifecycle import AttachedTrainer, ReplayLifecycle
from .live_comparison import compare_with_live
from .log import samples_another, warn_of_sampling
from .rollout import Turns


class RoutingReplayMixin(ReplayLifecycle):
    """
    Routing replay and sampling masks for a trainer of the GRPO family.

    What the sampler decided is recorded by rollout, and one tensor of identities, `rollout_samples`, travels with
    TRL's own batch and says which sample is where. Each pass of the policy over them replays the experts; each pass,
    that of the reference policy, too, scores over the tokens that were kept. The reference policy, reward models and
    evaluation route live.
    """

    def _check_parent(self):
        check_parent(type(self), AttachedTrainer)

    def _warn_of_sampling(self, masks):
        warn_of_sampling(self.args, masks)

    def rollout_turn(self, prompt_ids: list[list[int]]) -> tuple[Turn, list | None]:
        """
        Generate one turn with the configured engine, for use in a `rollout_func`. Threads that call it wait for each
        other, so that an engine serves them one after the other: give it the prompts of all conversations at once.

        Args:
            prompt_ids (list of `list[int]`):
                Prompts, one a completion.

        Returns:
            `tuple[Turn, list]`: The turn with its records and masks (join turns with [`stitch`]), and the sampled
            tokens' log-probabilities. In evaluation there are no records, and no log-probabilities where TRL has none.
        """
        turns = Turns() if self._r3 is None else self._r3.turns
        with turns.one_at_a_time:
            completion_ids, logprobs = self._generate_single_turn(prompt_ids, None, {}, 1)
            turn = turns.made.pop() if turns.made else Turn(prompt_ids, completion_ids, [])
        if logprobs is None and turn.logprobs is not None:
            logprobs = [values.tolist() for values in turn.logprobs]
        return turn, logprobs

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
            batch = super()._generate_and_score_completions(inputs)
            watch = self._deciding if r3 is None else None
            if watch is not None and self.model.training and not samples_another(self.args, masks=False):
                watch.look_at_batch(batch)
            return batch
        if r3.tracer is not None:
            r3.tracer.begin()
        own = super()._generate_and_score_completions
        output, scoring = self._recording_rollout(lambda: own(inputs))
        if scoring.old_logprobs is not None:
            r3.log_mismatch(output, scoring.samples, scoring.old_logprobs)
        live = compare_with_live(self, r3, output, scoring.old_logprobs) if r3.compare_is_due() else None
        if r3.tracer is not None:
            sampled = r3.rollout_logprobs(output, scoring.samples)
            r3.tracer.rolled_out(scoring.samples, output, sampled, scoring, live)
        return output

    def _compute_loss(self, model, inputs, *args):
        if self._r3 is None or self._r3.evaluates:
            return super()._compute_loss(model, inputs, *args)
        inputs = dict(inputs)  # TRL's own serves further updates
        with self._replaying_update(inputs):
            return super()._compute_loss(model, inputs, *args)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        def score():
            return super(RoutingReplayMixin, self)._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )

        if self._r3 is None or self._r3.scoring is None:
            return score()
        if not (self._r3.scoring.samples or torch.is_grad_enabled()):  # in a step that has no batch yet
            return score()
        return self._r3.score(model, input_ids, attention_mask, logits_to_keep, score)
