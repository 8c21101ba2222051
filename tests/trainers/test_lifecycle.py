"""A trainer without the switch is TRL's, and one whose training fails gives the model back."""

from __future__ import annotations

import pytest
import torch
from trainers.students import TRAINERS, make_student
from trainers.watching import instance_forwards

KINDS = sorted(TRAINERS)


@pytest.mark.parametrize("kind", KINDS)
def test_off_is_trl(qwen3, tmp_path, kind):
    plain = next(each for each in TRAINERS[kind].__mro__ if each.__module__.startswith("trl."))
    runs = []
    for trainer_class in (TRAINERS[kind], plain):
        trainer, _ = make_student(
            kind, tmp_path, qwen3(), trainer_class=trainer_class, use_routing_replay=False, scrambles=False
        )
        trainer.train()
        runs.append((trainer.model.state_dict(), [entry.get("loss") for entry in trainer.state.log_history]))
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(value, runs[1][0][name]) for name, value in runs[0][0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_fails_leaves_no_hook(qwen3, tmp_path, kind):
    class Failing(TRAINERS[kind]):
        def compute_loss(self, *args, **kwargs):
            attached.append(bool(instance_forwards(self.model)))
            raise ArithmeticError("of the loss")

    attached = []
    trainer, _ = make_student(kind, tmp_path, qwen3(), trainer_class=Failing, scrambles=False)
    with pytest.raises(ArithmeticError, match="of the loss"):
        trainer.train()
    assert attached == [True] and not instance_forwards(trainer.model)
    assert trainer.rollout_samples == [] and trainer.routing_replay.moe_layers == [0, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "value"), [("routing_replay_alarm", "loud"), ("routing_replay_max_missing", "0.1")])
def test_settings_that_are_changed_are_checked_when_training_begins(qwen3, tmp_path, kind, name, value):
    trainer, _ = make_student(kind, tmp_path, qwen3())
    right = getattr(trainer.args, name)
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=f"`{name}` is '{value}', expected"):
        trainer.train()
    setattr(trainer.args, name, right)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("name", ["use_routing_replay", "use_sampling_mask_replay"])
def test_a_switch_that_is_turned_later_is_refused(qwen3, build, name, built):
    """Without a word, training would go on as before."""
    trainer = build(qwen3(), **{"use_routing_replay": True, name: built})
    setattr(trainer.args, name, not built)
    with pytest.raises(ValueError, match=f"`{name}` is {not built}, but the trainer was built with {built}"):
        trainer.train()
    setattr(trainer.args, name, built)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_trainer_without_replay_is_asked_for_it_later(qwen3, tmp_path):
    trainer, _ = make_student("sdpo", tmp_path, qwen3(), use_routing_replay=False)
    trainer.args.use_routing_replay = True
    with pytest.raises(ValueError, match="`use_routing_replay` is True, but the trainer was built with False"):
        trainer.train()
