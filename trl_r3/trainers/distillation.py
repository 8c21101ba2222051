"""On-policy distillation whose student replays its rollout."""

from __future__ import annotations

from dataclasses import dataclass

from trl import DistillationConfig, DistillationTrainer

from .config import RoutingReplayConfigMixin
from .mixin import RoutingReplayMixin
from .students import check_student_config


@dataclass
class R3DistillationConfig(RoutingReplayConfigMixin, DistillationConfig):
    r"""
    Configuration class for the [`R3DistillationTrainer`]: [`~trl.DistillationConfig`] and the fields of
    [`RoutingReplayConfigMixin`].
    """

    def check_replay(self):
        check_student_config(self)


class R3DistillationTrainer(RoutingReplayMixin, DistillationTrainer):
    """
    [`~trl.DistillationTrainer`] whose student replays. The teacher routes live, also where it is the student's own
    module. Arguments are those of the parent.

    Args:
        args ([`R3DistillationConfig`], *optional*):
            Configuration.
    """

    _tag_names = ["trl", "distillation", "r3"]
    _name = "Distillation with Rollout Routing Replay (R3)"

    def _check_parent(self):
        """It scores by hidden states, below."""

    def _warn_of_sampling(self, masks):
        """The teacher scores whatever was sampled: there is no ratio to the sampler."""

    def _get_last_hidden_state(self, unwrapped_model, input_ids, attention_mask, logits_to_keep, **inputs):
        own = super()._get_last_hidden_state

        def forward():
            return own(unwrapped_model, input_ids, attention_mask, logits_to_keep, **inputs)

        if self._r3 is None:
            return forward()
        return self._r3.follow(input_ids, attention_mask, logits_to_keep, forward)
