"""IW-OPD whose student replays its rollout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

from .._compat import buffered_inputs
from .config import RoutingReplayConfigMixin
from .lifecycle import ReplayLifecycle
from .rollout import Scoring
from .students import check_student_config


@dataclass
class R3IWOPDConfig(RoutingReplayConfigMixin, IWOPDConfig):
    r"""
    Configuration class for the [`R3IWOPDTrainer`]: [`~trl.experimental.iw_opd.IWOPDConfig`] and the fields of
    [`RoutingReplayConfigMixin`].
    """

    def check_replay(self):
        check_student_config(self)
        judges = self.use_routing_replay and self.routing_replay_alarm != "off"
        if judges and self.use_vllm and self.vllm_sync_frequency != 1:
            raise ValueError(
                f"`vllm_sync_frequency` is {self.vllm_sync_frequency}, so that vLLM samples from weights of up to "
                f"{self.vllm_sync_frequency - 1} steps before, of which the alarm cannot judge the records. Set "
                "`vllm_sync_frequency=1`, or `routing_replay_alarm='off'`."
            )


class R3IWOPDTrainer(ReplayLifecycle, IWOPDTrainer):
    """
    [`~trl.experimental.iw_opd.IWOPDTrainer`] whose student replays. The teacher routes live, also where it is the
    student's own module, and so do completions of the data set (`lmbda` below 1), which nobody sampled: they are
    logged as not replayed. Arguments are those of the parent.

    Args:
        args ([`R3IWOPDConfig`], *optional*):
            Configuration.
    """

    _tag_names = ["trl", "iw-opd", "r3"]
    _name = "IW-OPD with Rollout Routing Replay (R3)"

    def _generate_student_completions(self, slices, on_policy_indices):
        r3 = self._r3
        if r3 is None:
            return super()._generate_student_completions(slices, on_policy_indices)
        r3.begin_turns()
        r3.rollouts.begin()
        prompt_ids: list[list[int]] = []
        completion_ids: list[list[int]] = []
        # a model is asked for one slice after the other, vLLM for all of them at once
        for indices in [on_policy_indices] if self.use_vllm else [[index] for index in on_policy_indices]:
            with r3.recorded_turn() as make_turn:
                super()._generate_student_completions(slices, indices)
            turn = [_sequences(buffered_inputs(self)[index]) for index in indices]
            prompts, completions = ([ids for part in parts for ids in part] for parts in zip(*turn, strict=True))
            r3.turns.add(make_turn, prompts, completions)
            prompt_ids, completion_ids = prompt_ids + prompts, completion_ids + completions
        with r3.scores(Scoring()):
            r3.end_rollout(prompt_ids, completion_ids, None)
        assert r3.rollout is not None  # it has just ended
        identities = r3.rollout.identities(self.accelerator.device)
        filled = [buffered_inputs(self)[index] for index in on_policy_indices]
        for inputs, part in zip(filled, identities.split([len(each["input_ids"]) for each in filled]), strict=True):
            inputs["rollout_samples"] = part
        self._check_rollout()
        return None

    def compute_loss(self, model, inputs, *args, **kwargs):
        r3 = self._r3
        if r3 is None or r3.evaluates:
            return super().compute_loss(model, inputs, *args, **kwargs)
        if self.lmbda < 1.0 and "rollout_samples" not in inputs:  # of the data set
            with self.live_routing():
                return super().compute_loss(model, inputs, *args, **kwargs)
        ids, mask, prompt_width = inputs["input_ids"], inputs["attention_mask"], inputs["prompts"].size(1)

        def student(**forward):  # all that TRL calls the model for: the teacher is called by its own name
            return r3.follow(ids, mask, ids.size(1) - prompt_width, lambda: model(**forward))

        with self._replaying_update(inputs):
            return super().compute_loss(student, inputs, *args, **kwargs)


def _sequences(inputs: dict[str, torch.Tensor]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions of a slice, without padding."""
    width, real = inputs["prompts"].size(1), inputs["attention_mask"].bool()
    rows = list(zip(inputs["input_ids"], real, strict=True))
    prompts = [ids[:width][mask[:width]].tolist() for ids, mask in rows]
    return prompts, [ids[width:][mask[width:]].tolist() for ids, mask in rows]
