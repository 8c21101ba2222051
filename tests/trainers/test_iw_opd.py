"""IW-OPD: a data set between the rollouts, and slices of a rollout that a model makes one after the other."""

from __future__ import annotations

import pytest
from trainers.students import assert_updates_replay, make_student

from trl_r3 import R3IWOPDConfig, R3IWOPDTrainer


def test_completions_of_the_data_set_route_live_and_are_logged(qwen3, tmp_path):
    """IW-OPD mixes in completions that nobody sampled."""

    class Mixed(R3IWOPDTrainer):
        def _fill_buffer(self, batch, steps):
            super()._fill_buffer(batch, steps)
            for inputs, sampled in zip(self._buffered_inputs, self._buffered_on_policy_flags, strict=True):
                assert ("rollout_samples" in inputs) == sampled
            flags.extend(self._buffered_on_policy_flags)

    flags = []
    run = {"lmbda": 0.5, "distillation_objective": "jsd", "gradient_accumulation_steps": 4, "max_steps": 2}
    trainer, _ = make_student("iw_opd", tmp_path, qwen3(), trainer_class=Mixed, **run)
    trainer.train()
    assert {True, False} == set(flags), "the case itself"
    assert all(0 < entry["routing_replay/replayed_frac"] < 1 for entry in trainer.state.log_history[:-1])


def test_records_of_older_weights_are_not_judged(tmp_path):
    """TRL refuses the setting for its own objective, and lets it be with the others."""
    settings = {"use_vllm": True, "distillation_objective": "jsd", "use_routing_replay": True, "bf16": False}
    with pytest.raises(ValueError, match="`vllm_sync_frequency` is 4, .* weights of up to 3 steps before"):
        R3IWOPDConfig(str(tmp_path), **settings, vllm_sync_frequency=4)
    R3IWOPDConfig(str(tmp_path), **settings, vllm_sync_frequency=4, routing_replay_alarm="off")
    R3IWOPDConfig(str(tmp_path), **{**settings, "use_routing_replay": False}, vllm_sync_frequency=4)
    R3IWOPDConfig(str(tmp_path), **settings)


def test_without_a_data_set_a_batch_that_lost_its_identities_is_an_error(qwen3, tmp_path):
    class Losing(R3IWOPDTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, {k: v for k, v in inputs.items() if k != "rollout_samples"}, *args)

    trainer, _ = make_student("iw_opd", tmp_path, qwen3(), trainer_class=Losing)
    with pytest.raises(RuntimeError, match="has no `rollout_samples`"):
        trainer.train()


@pytest.mark.parametrize("objective", ["iw_opd", "jsd"])
def test_slices_of_an_accumulation(qwen3, tmp_path, objective):
    run = {"gradient_accumulation_steps": 2, "num_generations": 2, "distillation_objective": objective}
    trainer, watch = make_student("iw_opd", tmp_path, qwen3(), **run)
    trainer.train()
    assert len(watch.updates) == 4
    assert_updates_replay(watch)
