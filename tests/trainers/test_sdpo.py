"""SDPO: a teacher in the base of an adapter or in another one, an old policy, and its record as that of R2."""

from __future__ import annotations

import copy

import pytest
import torch
from oracles import changed_rows
from peft import LoraConfig
from trainers.students import ADAPTER, assert_updates_replay, make_student

from trl_r3 import R3SDPOTrainer


@pytest.mark.parametrize("teacher_kind", ["base", "ema"])
def test_teacher_of_sdpo_in_the_base_or_in_another_adapter(qwen3, tmp_path, teacher_kind):
    base = qwen3()
    passed = {"peft_config": LoraConfig(r=4, **ADAPTER)}
    trainer, watch = make_student(
        "sdpo", tmp_path, copy.deepcopy(base), passed=passed, teacher_model_kind=teacher_kind, teacher_update_rate=0.0
    )
    trainer.train()
    assert_updates_replay(watch)
    for one in watch.scored:  # an adapter that moves by nothing is still zero: both teachers are the base
        assert torch.equal(one.hidden, hidden(base, one))
    student = watch.updates[0]
    assert not torch.equal(watch.live_hidden(student), hidden(base, student)), "the adapter does nothing"


def hidden(model, one):
    with torch.no_grad():
        return model.model(input_ids=one.input_ids, attention_mask=one.attention_mask).last_hidden_state


def test_an_old_policy_of_sdpo_replays_and_its_ratio_is_one(qwen3, tmp_path):
    ratios = []

    class Noting(R3SDPOTrainer):
        def _compute_policy_loss(self, inputs, student_logits):
            logps = student_logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
            counted = inputs["completion_mask"].bool()
            ratios.append((logps - inputs["old_per_token_logps"]).exp()[counted].detach())
            return super()._compute_policy_loss(inputs, student_logits)

    trainer, watch = make_student(
        "sdpo", tmp_path, qwen3(), trainer_class=Noting, num_iterations=2, distillation_weight=0.5
    )
    trainer.train()
    assert_updates_replay(watch)
    assert torch.allclose(ratios[0], torch.ones_like(ratios[0]), atol=1e-5)
    assert not torch.allclose(ratios[1], torch.ones_like(ratios[1]), atol=1e-5), "the weights have not moved"
    old = watch.scored[0]
    assert not torch.equal(old.hidden, watch.live_hidden(old)), "a live old policy is the same, which shows nothing"


def test_r2_of_sdpo_replays_its_old_policy(qwen3, tmp_path):
    trainer, watch = make_student("sdpo", tmp_path, qwen3(), num_iterations=2, routing_replay_mode="R2")
    trainer.train()
    old = watch.scored[0]
    assert torch.equal(old.hidden, watch.live_hidden(old))
    for one in watch.updates:
        for (tokens, rows), (same, recorded) in zip(one.samples(one.calls), old.samples(old.calls), strict=True):
            assert tokens == same and not changed_rows(rows, recorded).any()
    moved = watch.updates[1]
    assert changed_rows(watch.live_rows(moved), watch.live_rows(watch.updates[0])).any()
