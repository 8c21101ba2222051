"""SDPO whose student replays its rollout."""

from __future__ import annotations

from dataclasses import dataclass

from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from .config import RoutingReplayConfigMixin
from .lifecycle import ReplayLifecycle
from .students import check_student_config


@dataclass
class R3SDPOConfig(RoutingReplayConfigMixin, SDPOConfig):
    r"""
    Configuration class for the [`R3SDPOTrainer`]: [`~trl.experimental.sdpo.SDPOConfig`] and the fields of
    [`RoutingReplayConfigMixin`].
    """

    def check_replay(self):
        assert self.steps_per_generation is not None  # the parent has set it
        updates = self.steps_per_generation * self.num_iterations
        check_student_config(self, has_old_policy_forward=self.gradient_accumulation_steps % updates != 0)


class R3SDPOTrainer(ReplayLifecycle, SDPOTrainer):
    """
    [`~trl.experimental.sdpo.SDPOTrainer`] whose student replays. The teacher routes live: the student's own module,
    one of its adapters, its base, or a copy. Arguments are those of the parent.

    Args:
        args ([`R3SDPOConfig`], *optional*):
            Configuration.
    """

    _tag_names = ["trl", "sdpo", "r3"]  # no `_name`: TRL makes names of metrics of it

    def _generate(self, prompt_ids):
        r3 = self._r3
        if r3 is None or r3.evaluates:
            return super()._generate(prompt_ids)
        r3.begin_turns()
        with r3.recorded_turn() as make_turn:
            prompt_ids, completion_ids = super()._generate(prompt_ids)
        r3.turns.add(make_turn, prompt_ids, completion_ids)
        r3.end_rollout(prompt_ids, completion_ids, None)
        return prompt_ids, completion_ids

    def _prepare_training_batch(self, inputs):
        own = super()._prepare_training_batch
        if self._r3 is None or self._r3.evaluates:
            return own(inputs)
        return self._recording_rollout(lambda: own(inputs))[0]

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self._r3 is None or self._r3.evaluates:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with self._replaying_update(inputs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _forward_logits(self, model, input_ids, attention_mask, logits_to_keep):
        own = super()._forward_logits

        def forward():
            return own(model, input_ids, attention_mask, logits_to_keep)

        if self._r3 is None:
            return forward()
        return self._r3.follow(input_ids, attention_mask, logits_to_keep, forward)
