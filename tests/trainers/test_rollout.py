"""`routing_replay_spill_dir`: the same training, bit for bit, with the records of one rollout in files."""

import copy

import file_systems
import pytest
import torch
from transformers import TrainerCallback

from trl_r3 import R3GRPOTrainer
from trl_r3.trainers.rollout import Scoring

RUN = {"max_steps": 8, "num_iterations": 2, "steps_per_generation": 2, "learning_rate": 1e-2}  # two rollouts


class Files(TrainerCallback):
    """What lies in the folder, and the records of the rollout, when each step ends."""

    def __init__(self, folder):
        self.folder, self.trainer = folder, None
        self.files, self.records = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.files.append({str(path) for path in self.folder.rglob("*.safetensors")})
        self.records.append([sample.record for sample in self.trainer.rollout_samples])


@pytest.mark.parametrize("mode", ["R3", "R2"])
def test_the_same_weights(qwen3, build, gap, tmp_path, mode):
    model = qwen3()
    folder = tmp_path / "records"
    weights, watched = [], []
    for spill in (None, str(folder)):
        files = Files(folder)
        trainer = build(
            copy.deepcopy(model),
            **RUN,
            routing_replay_mode=mode,
            routing_replay_spill_dir=spill,
            callbacks=[files],
            while_generating=gap["scrambled"],
        )
        files.trainer = trainer
        torch.manual_seed(0)
        trainer.train()
        weights.append(trainer.model.state_dict())
        watched.append(files)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(value, weights[0][name]) for name, value in model.state_dict().items())
    in_memory, in_files = watched
    assert in_memory.files == [set()] * 8
    assert [len(files) for files in in_files.files] == [8] * 8  # those of one rollout, never of two
    assert in_files.files[0] == in_files.files[3] and in_files.files[4] == in_files.files[7]
    assert not in_files.files[0] & in_files.files[4]
    assert list(folder.iterdir()) == []  # nothing stays
    for before, after in zip(in_memory.records, in_files.records, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("mode", ["R3", "R2"])
def test_a_file_system_that_keeps_what_is_mapped(qwen3, build, tmp_path, monkeypatch, mode):
    file_systems.keep_what_is_mapped(monkeypatch)
    folder = tmp_path / "records"
    trainer = build(qwen3(), **RUN, routing_replay_mode=mode, routing_replay_spill_dir=str(folder))
    trainer.train()
    assert trainer.state.global_step == RUN["max_steps"] and list(folder.iterdir()) == []


def test_nothing_stays_after_an_error(qwen3, build, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            assert list((tmp_path / "records").rglob("*.safetensors"))
            raise KeyboardInterrupt

    trainer = build(qwen3(), routing_replay_spill_dir=str(tmp_path / "records"), callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert list((tmp_path / "records").iterdir()) == []


def test_a_full_disk_says_so(qwen3, build, tmp_path, monkeypatch):
    from trl_r3.records import spill

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill, "save_file", full)
    trainer = build(qwen3(), routing_replay_spill_dir=str(tmp_path / "records"))
    with pytest.raises(
        OSError, match="of 4 samples cannot be written .* No space left on device.* Set it to a folder"
    ):
        trainer.train()
    assert list((tmp_path / "records").iterdir()) == []


def test_records_go_before_the_next_rollout_is_made(qwen3, build, tmp_path):
    """Or a host would hold two of them."""
    held = []

    class Watched(R3GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            held.append(sum(sample.record.numel() for sample in self.rollout_samples))
            return super()._generate_single_turn(*args, **kwargs)

    trainer = build(qwen3(), trainer_class=Watched, max_steps=3)
    sizes = []

    class Sizes(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            sizes.append(sum(sample.record.numel() for sample in trainer.rollout_samples))

    trainer.add_callback(Sizes())
    trainer.train()
    assert held == [0, 0, 0]
    assert min(sizes) > 0


@pytest.mark.parametrize(
    ("batch", "is_update", "has_old_policy"),
    [
        (None, False, False),
        ({"completion_ids": 0}, True, False),
        ({"old_per_token_logps": 0}, True, True),  # of GRPO
        ({"old_logps": 0}, True, True),  # of RLOO
    ],
)
def test_what_is_scored(batch, is_update, has_old_policy):
    scoring = Scoring(batch=batch)
    assert (scoring.is_update, scoring.has_old_policy) == (is_update, has_old_policy)


def test_samples_are_of_one_scoring():
    one, other = Scoring(), Scoring()
    one.samples.append(object())
    assert other.samples == []
