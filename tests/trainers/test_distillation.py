"""Distillation: an accumulation of one rollout, and a student that calls tools."""

from __future__ import annotations

import pytest
from engines.tiny_chat import VOCAB, conversations, make_tokenizer, tiny_qwen3_moe
from engines.watch import Watched
from trainers.students import ForwardWatch, assert_updates_replay, make_student, wrong_rows

from trl_r3 import R3DistillationConfig, R3DistillationTrainer


def test_an_accumulation_of_one_rollout(qwen3, tmp_path):
    trainer, watch = make_student("distillation", tmp_path, qwen3(), gradient_accumulation_steps=2)
    trainer.train()
    assert len(watch.updates) == 4
    assert_updates_replay(watch)
    assert len(trainer.state.log_history) == 3


class WatchedTurns(Watched, R3DistillationTrainer):
    pass


def fed_to(turn):
    return list(zip(turn.prompt_ids, turn.completion_ids, strict=True))


def look(at: str = "") -> str:
    """
    Look.

    Args:
        at: Where.
    """
    return "sun moon"


def test_a_student_that_calls_tools(tmp_path):
    trainer = WatchedTurns(
        model=tiny_qwen3_moe(),
        teacher_model=tiny_qwen3_moe(1),
        args=R3DistillationConfig(
            str(tmp_path),
            use_routing_replay=True,
            use_cpu=True,
            bf16=False,
            max_steps=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            gradient_checkpointing=False,
            max_completion_length=24,
            max_tool_calling_iterations=1,
            generation_kwargs={"sequence_bias": [[[VOCAB["<look>"]], 8.0], [[VOCAB["<eos>"]], 6.0]]},
            report_to=[],
        ),
        train_dataset=conversations(["t30 t31", "t40", "t50 t51 t52", "t60"]),
        processing_class=make_tokenizer(),
        tools=[look],
    )
    watch = ForwardWatch(trainer.model)
    trainer.train()
    assert len(trainer.turns) > 1, "nobody called the tool"
    (update,) = watch.updates
    first = trainer.turns[0]
    fed = [([*p, *c], first.rows(i)) for i, (p, c) in enumerate(fed_to(first))]
    for tokens, rows in update.samples(update.calls):
        own = [(ids, recorded) for ids, recorded in fed if tokens[: len(ids)] == ids]
        assert own and min(wrong_rows((ids, rows[: len(ids) - 1]), [(ids, r)]) for ids, r in own) == 0


def test_the_parent_alone_is_refused_as_one_of_grpo():
    """The mixin of the GRPO family does not reach its forwards: the trainer says how."""
    from trl import DistillationTrainer

    from trl_r3.trainers.mixin import RoutingReplayMixin

    class Plain(RoutingReplayMixin, DistillationTrainer):
        pass

    with pytest.raises(TypeError, match="_get_per_token_logps_and_entropies.*for distillation R3DistillationTrainer"):
        Plain(model="none")
