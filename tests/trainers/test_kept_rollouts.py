"""Subclasses that roll out several times for a batch, in pieces, or train on samples of earlier batches."""

import gc
import weakref

import pytest
import torch
from trainers.two_processes import BUFFER, launched
from transformers import TrainerCallback

from trl_r3 import R3GRPOTrainer
from trl_r3.records.checks import MisalignedRecordError
from trl_r3.trainers.rollout import KeptRollouts


def joined(batches):
    """Batches of TRL as one: prompts are padded on the left, completions on the right."""
    return {name: _joined(name, [batch[name] for batch in batches]) for name in batches[0]}


def _joined(name, parts):
    if not torch.is_tensor(parts[0]) or not parts[0].ndim:
        return parts[0]
    if parts[0].ndim == 2:
        width = max(part.shape[1] for part in parts)
        missing = [width - part.shape[1] for part in parts]
        sides = [(n, 0) if "prompt" in name else (0, n) for n in missing]
        parts = [torch.nn.functional.pad(part, side) for part, side in zip(parts, sides, strict=True)]
    return torch.cat(parts)


def part_of(batch, rows):
    return {name: value[rows] if torch.is_tensor(value) and value.ndim else value for name, value in batch.items()}


class Resampling(R3GRPOTrainer):
    """Dynamic sampling: of each try, only the second group has a signal."""

    forgets = False  # the watch of the tests

    def _generate_and_score_completions(self, inputs):
        tries = [super(Resampling, self)._generate_and_score_completions(inputs) for _ in range(2)]
        return joined([part_of(batch, slice(2, 4)) for batch in tries])


class InPieces(R3GRPOTrainer):
    """A rollout whose prompts are sent in two pieces, as an engine with a small queue wants them."""

    forgets = False
    order = (0, 1)

    def _generate(self, prompts):
        half = len(prompts) // 2
        pieces = [prompts[:half], prompts[half:]]
        made = {index: super(InPieces, self)._generate(pieces[index]) for index in self.order}
        return tuple(one if one is None else [*one, *other] for one, other in zip(made[0], made[1], strict=True))


class Buffering(R3GRPOTrainer):
    """A replay buffer: half of each batch is of the one before."""

    forgets = False
    reaches = 1

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.seen = [*getattr(self, "seen", []), batch]
        old = self.seen[max(len(self.seen) - 1 - self.reaches, 0)]
        return joined([part_of(batch, slice(0, 2)), part_of(old, slice(2, 4))])


class BufferingKept(Buffering):
    kept_rollouts = 1


def assert_replayed(trainer, check, count):
    updates = trainer.of("update")
    assert len(updates) == count
    for one in updates:
        check.replayed(one)
        check.drifted(trainer, one)


RUN = {"max_steps": 3, "learning_rate": 1e-2}
SETTINGS = {"new": {}, "old policy": {"num_iterations": 2}, "compared": {"routing_replay_compare_every": 1}}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", [Resampling, InPieces, BufferingKept])
def test_every_sample_of_a_joined_batch_replays(qwen3, train, check, gap, kind, changes):
    trainer = train(qwen3(), trainer_class=kind, while_generating=gap["scrambled"], **RUN, **changes)
    assert_replayed(trainer, check, 3)


@pytest.mark.parametrize("kind", [Resampling, InPieces])
def test_with_records_in_files(qwen3, train, check, gap, tmp_path, kind):
    folder = tmp_path / "records"
    trainer = train(
        qwen3(),
        trainer_class=kind,
        while_generating=gap["scrambled"],
        routing_replay_spill_dir=str(folder),
        **RUN,
    )
    assert_replayed(trainer, check, 3)
    assert list(folder.iterdir()) == []


def test_masks_of_joined_batches(qwen3, train, check):
    """On both sides the same distribution, so that a mask of another sample would show."""
    trainer = train(qwen3(), trainer_class=Resampling, use_sampling_mask_replay=True, top_p=0.8, **RUN)
    found = [log["sampling/k3_kl"] for log in trainer.state.log_history if "sampling/k3_kl" in log]
    assert len(found) == 3 and max(found) < 1e-10


def test_pieces_in_another_order_are_an_error(qwen3, build):
    class Reversed(InPieces):
        order = (1, 0)

    trainer = build(qwen3(), trainer_class=Reversed, num_iterations=2)
    with pytest.raises(MisalignedRecordError, match="sample 0"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_samples_beyond_the_bound_are_an_error_that_names_it(qwen3, build):
    trainer = build(qwen3(), trainer_class=Buffering, **RUN)
    with pytest.raises(
        MisalignedRecordError, match=r"names sample [23], but 4 to 7 .* set `kept_rollouts` .* is 0, to"
    ):
        trainer.train()
    assert trainer.state.global_step == 1

    class TooFar(BufferingKept):
        reaches = 2

    trainer = build(qwen3(), trainer_class=TooFar, **RUN)
    with pytest.raises(MisalignedRecordError, match=r"names sample [23], but 4 to 11 .* of 2 batches"):
        trainer.train()
    assert trainer.state.global_step == 2


class Held(TrainerCallback):
    """How many of all records that were ever made are alive at the end of each step."""

    def __init__(self):
        self.records, self.alive = [], []

    def on_step_end(self, *args, **kwargs):
        gc.collect()
        self.alive.append(sum(each() is not None for each in self.records))


@pytest.mark.parametrize(("kind", "alive"), [(Resampling, [4, 4, 4, 4]), (BufferingKept, [4, 8, 8, 8])])
def test_memory_is_flat(qwen3, build, kind, alive):
    held = Held()

    class Noting(kind):
        def _generate_single_turn(self, *args, **kwargs):
            generated = super()._generate_single_turn(*args, **kwargs)
            # of a sample of one turn it is the turn's own tensor
            held.records += [weakref.ref(record) for record in self._r3.turns.made[-1].records]
            return generated

    trainer = build(qwen3(), trainer_class=Noting, callbacks=[held], max_steps=4)
    trainer.train()
    assert len(held.records) == (32 if kind is Resampling else 16)
    assert held.alive == alive
    gc.collect()
    assert all(each() is None for each in held.records)


def test_layout_before_and_after_training(qwen3, build):
    trainer = build(qwen3())
    layout = trainer.routing_replay.layout
    assert (layout.moe_layers, layout.num_experts, layout.top_k) == ((0, 2, 3), 16, 4)
    for wrong in (
        trainer.routing_replay.record,
        lambda: trainer.routing_replay.replay(torch.arange(4).expand(1, 4, 3, 4)),
    ):
        with pytest.raises(RuntimeError, match="on a handle that was removed"), wrong():
            pass
    trainer.train()
    assert trainer.routing_replay.layout == layout
    assert not any("forward" in vars(layer) for layer in trainer.model.model.layers)


def test_processes_meet_though_one_trains_on_earlier_samples(tmp_path_factory):
    """Records are judged together: the other process would wait for one that finds nothing to judge."""
    assert [report["steps"] for report in launched(tmp_path_factory)(BUFFER)] == [3, 3]


def test_nothing_is_kept_of_what_was_dropped():
    rollouts = KeptRollouts()
    assert rollouts.samples == [] and rollouts.last is None
    with pytest.raises(MisalignedRecordError, match="names sample 0, but no samples are kept"):
        rollouts.get_samples([0])
