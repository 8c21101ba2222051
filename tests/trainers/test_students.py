"""Students of on-policy distillation replay their rollout; their teacher never does, also in the student's module."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from trainers.runs import CHECKPOINTING
from trainers.students import (
    ADAPTER,
    CONFIGS,
    TRAINERS,
    ForwardWatch,
    assert_teacher_is_live,
    assert_updates_replay,
    make_student,
)
from trainers.watching import instance_forwards

KINDS = sorted(TRAINERS)


def below(model):
    """Forwards of modules that are not those of their classes; TRL's way to the student leaves one on the model."""
    return {name: forward for name, forward in instance_forwards(model).items() if name}


def assert_logged(trainer):
    logs = [entry for entry in trainer.state.log_history if "routing_replay/replayed_frac" in entry]
    assert len(logs) == trainer.state.global_step
    assert {entry["routing_replay/replayed_frac"] for entry in logs} == {1.0}
    assert all(entry["routing_replay/changed_router_frac"] > 0 for entry in logs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_updates_replay_and_a_teacher_in_the_same_module_does_not(qwen3, tmp_path, kind, checkpointing):
    trainer, watch = make_student(kind, tmp_path, qwen3(), **CHECKPOINTING[checkpointing])
    before = below(trainer.model)
    trainer.train()
    assert_updates_replay(watch, recomputes=checkpointing != "none")
    assert len(watch.scored) == len(watch.updates) == 2
    assert_teacher_is_live(watch, watch.scored)
    assert_logged(trainer)
    assert below(trainer.model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_has_the_names_of_the_parent(qwen3, tmp_path, kind):
    """SDPO makes names of metrics of its own name."""
    parent = next(each for each in TRAINERS[kind].__mro__ if not each.__module__.startswith("trl_r3"))
    names = []
    for trainer_class, replays in ((parent, False), (TRAINERS[kind], True)):
        settings = {"use_routing_replay": replays, "max_steps": 1}
        trainer, _ = make_student(kind, tmp_path, qwen3(), trainer_class=trainer_class, **settings)
        trainer.train()
        names.append({name for entry in trainer.state.log_history for name in entry})
    assert {name for name in names[1] if not name.startswith(("routing_replay/", "sampling/"))} == names[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_replays_is_rejected(qwen3, tmp_path, kind):
    """The wrong variant: the gate tells the teacher by the graph that it does not build."""

    class TeacherReplays(TRAINERS[kind]):
        def _get_last_hidden_state(self, *args, **kwargs):
            with torch.enable_grad():
                return super()._get_last_hidden_state(*args, **kwargs)

        def _forward_logits(self, *args, **kwargs):
            with torch.enable_grad():
                return super()._forward_logits(*args, **kwargs)

        def _get_teacher_logits(self, inputs):
            samples = self._r3.scoring.samples
            ids, mask, width = inputs["input_ids"], inputs["attention_mask"], inputs["prompts"].size(1)
            assert samples
            with torch.enable_grad():
                return self._r3.follow(
                    ids, mask, ids.size(1) - width, lambda: super(TRAINERS[kind], self)._get_teacher_logits(inputs)
                )

    trainer, watch = make_student(kind, tmp_path, qwen3(), trainer_class=TeacherReplays, max_steps=1)
    if kind == "sdpo":  # its teacher is asked about other tokens, which the records refuse
        with pytest.raises(RuntimeError, match="tokens of the batch differ"):
            trainer.train()
        return
    trainer.train()
    _, teacher = watch.after_rollout
    with pytest.raises(AssertionError, match="the teacher did not route live"):
        assert_teacher_is_live(watch, [teacher])


@pytest.mark.parametrize("kind", ["distillation", "iw_opd"])
def test_a_teacher_of_its_own_is_never_touched(qwen3, tmp_path, kind):
    teacher = qwen3(1).eval()
    seen = ForwardWatch(teacher)
    found = []
    teacher.model.register_forward_hook(lambda *_: found.append(below(teacher)))
    trainer, watch = make_student(kind, tmp_path, qwen3(), teacher)
    trainer.train()
    assert_updates_replay(watch)
    assert not watch.scored
    assert_teacher_is_live(seen, seen.forwards)
    assert found == [{}] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_adapters(qwen3, tmp_path, kind):
    teacher = qwen3(1) if kind != "sdpo" else None
    passed = {"peft_config": LoraConfig(r=4, **ADAPTER)}
    trainer, watch = make_student(kind, tmp_path, qwen3(), teacher, passed=passed)
    trainer.train()
    assert_updates_replay(watch)
    assert_logged(trainer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "value"),
    [("routing_replay_compare_every", 1), ("routing_replay_trace_dir", "t"), ("use_sampling_mask_replay", True)],
)
def test_what_a_student_has_not_is_refused(tmp_path, kind, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value!r}, but it needs log-probabilities"):
        CONFIGS[kind](str(tmp_path), use_cpu=True, bf16=False, use_routing_replay=True, **{name: value})


@pytest.mark.parametrize("kind", KINDS)
def test_r2_without_an_old_policy_is_refused(tmp_path, kind):
    with pytest.raises(ValueError, match="`routing_replay_mode='R2'` replays what the old-policy forward recorded"):
        CONFIGS[kind](str(tmp_path), use_cpu=True, bf16=False, use_routing_replay=True, routing_replay_mode="R2")
