"""What was recorded is gone when its rollout is replaced, and when `train()` is over, however that ended."""

import gc
import weakref

import pytest
from transformers import TrainerCallback

from trl_r3 import R3GRPOTrainer

ALL = {
    "use_sampling_mask_replay": True,
    "top_p": 0.9,
    "num_iterations": 2,
    "routing_replay_compare_every": 1,
}


class Held(TrainerCallback):
    """Weak references to all that each rollout recorded, by step."""

    def __init__(self):
        self.trainer, self.by_rollout = None, []

    def on_step_end(self, args, state, control, **kwargs):
        samples = self.trainer.rollout_samples
        parts = [part for s in samples for part in (s, s.record, s.mask.ids, s.logprobs)]
        self.by_rollout.append([weakref.ref(part) for part in parts])

    def alive(self, rollout):
        gc.collect()
        return [reference for reference in self.by_rollout[rollout] if reference() is not None]


@pytest.fixture
def held(qwen3, build, tmp_path):
    """Makes a trainer, and what it holds."""

    def make(**changes):
        held = Held()
        traces = {"routing_replay_trace_dir": str(tmp_path / "traces")}
        held.trainer = build(qwen3(), callbacks=[held], **{**ALL, **traces, **changes})
        return held

    return make


def test_all_of_it_is_gone_when_training_is_over(held):
    one = held(max_steps=2)
    one.trainer.train()
    assert len(one.by_rollout) == 2 and all(len(references) == 16 for references in one.by_rollout)
    assert one.alive(0) == [] and one.alive(1) == []
    session = one.trainer._r3
    assert session.rollout is session.scoring is session.tracer is session.attachment.alarm is None
    assert session.turns.made == [] and one.trainer.rollout_samples == []


def test_it_is_gone_when_the_next_rollout_is_made(held):
    """Or a host would hold two of them."""
    seen = []

    class Asking(R3GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            if one.by_rollout:
                seen.append(one.alive(-1))
            return super()._generate_single_turn(*args, **kwargs)

    one = held(trainer_class=Asking, max_steps=4)
    one.trainer.train()
    assert seen == [[]]


class Stop(TrainerCallback):
    """Stops the first training, as a user of a notebook does."""

    def __init__(self):
        self.stops = True

    def on_step_end(self, *args, **kwargs):
        if self.stops:
            self.stops = False
            raise KeyboardInterrupt


def test_it_is_gone_after_an_exception(held):
    one = held(max_steps=3)
    one.trainer.add_callback(Stop())
    try:
        one.trainer.train()
        raise AssertionError("the run went on")
    except KeyboardInterrupt:
        pass
    assert one.by_rollout and one.alive(0) == []
    assert one.trainer._r3.rollout is None


def test_a_sample_that_is_held_is_seen(held):
    """Or the tests above could not fail."""
    one, kept = held(max_steps=1), []

    class Keep(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            kept.extend(sample.record for sample in one.trainer.rollout_samples)

    one.trainer.add_callback(Keep())
    one.trainer.train()
    assert len(one.alive(0)) == len(kept) == 4


def test_tokens_are_compared_once_a_pass(qwen3, build, monkeypatch):
    """Each comparison waits for the device; the forwards of a pass are given slices of what was compared."""
    from trl_r3.records import samples

    calls, own = [], samples.check_tokens
    monkeypatch.setattr(samples, "check_tokens", lambda *args: calls.append(len(args[0])) or own(*args))
    trainer = build(qwen3(), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1, **ALL)
    trainer.train()
    passes = [one for one in trainer.passes if one.name in ("old policy", "comparison", "update")]
    assert calls == [len(one.input_ids) for one in passes] == [4, 4, 2, 2]


@pytest.mark.parametrize("callbacks", [[], [Stop()]], ids=["over", "interrupted"])
def test_training_that_ended_between_two_rollouts_begins_again(qwen3, build, check, callbacks):
    """TRL goes on with the batch that was left, whose records are gone."""
    trainer = build(qwen3(), num_iterations=2, max_steps=3, callbacks=callbacks)
    if callbacks:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train()
    trainer.passes.clear()
    trainer.train()
    updates = trainer.of("update")
    assert [one.step for one in updates] == [0, 1, 2]
    for one in updates:
        check.replayed(one)


def test_nothing_is_logged_of_a_training_before(qwen3, build):
    trainer = build(qwen3(), max_steps=4, logging_steps=2, routing_replay_load_every=2, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer._r3.log.collect() == {} and trainer._r3.loads is None
    for _ in range(2):
        trainer.train()
        entries = trainer.state.log_history
        assert [each["step"] for each in entries if "routing_replay/load/entropy" in each] == [2, 4]
