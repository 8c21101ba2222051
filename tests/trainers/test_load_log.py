"""What a run logs of the load, against a count of what the rollout executed; how agreement ages; and never unasked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trainers.students import make_student

from trl_r3 import RoutingLayout
from trl_r3.records.metrics import AGES, agreement_at
from trl_r3.records.samples import Sample
from trl_r3.trainers.load_log import LoadLog

ITERATED = {"num_iterations": 4, "max_steps": 8, "learning_rate": 3e-2, "routing_replay_load_every": 1}
LAYERS, EXPERTS = [0, 2, 3], 16


def loads(trainer):
    return [entry for entry in trainer.state.log_history if "routing_replay/load/max_over_mean" in entry]


def counted(update):
    """(L, E) on the host: a bincount of what the experts were given in the rollout that an update trains on."""
    rows = update.recorded[update.fed]
    return np.stack([np.bincount(rows[:, layer].flatten().numpy(), minlength=EXPERTS) for layer in range(3)])


def test_a_run_logs_what_a_bincount_says(qwen3, train, gap):
    trainer = train(qwen3(), while_generating=gap["scrambled"], routing_replay_load_every=2, max_steps=4)
    logged = loads(trainer)
    assert [entry["step"] for entry in logged] == [1, 3]
    for entry, update in zip(logged, trainer.of("update")[::2], strict=True):
        load = counted(update)
        share = load / load.sum(1, keepdims=True)
        busiest, dead = load.max(1) / load.mean(1), (load == 0).sum(1)
        entropy = [-sum(p * np.log(p) for p in row if p) / np.log(EXPERTS) for row in share]
        for index, layer in enumerate(LAYERS):
            prefix = f"routing_replay/load/layer_{layer}"
            assert entry[f"{prefix}/max_over_mean"] == pytest.approx(busiest[index])
            assert entry[f"{prefix}/dead_experts"] == dead[index]
            assert entry[f"{prefix}/entropy"] == pytest.approx(entropy[index])
        assert entry["routing_replay/load/max_over_mean"] == pytest.approx(busiest.max())
        assert entry["routing_replay/load/dead_experts"] == dead.max()
        assert entry["routing_replay/load/entropy"] == pytest.approx(min(entropy))


def test_agreement_falls_as_records_age(qwen3, train):
    trainer = train(qwen3(), **ITERATED)
    logs = trainer.state.log_history[:8]
    assert [[age for age in AGES if agreement_at(age) in entry] for entry in logs] == [[0], [1], [2], [2]] * 2
    of_age = {age: [entry[agreement_at(age)] for entry in logs if agreement_at(age) in entry] for age in AGES}
    assert min(of_age[0]) > 0.99 > max(of_age[2])
    assert of_age[0] == pytest.approx([entry["routing_replay/agreement"] for entry in logs[::4]])  # one noun


def test_r2_logs_the_load_of_its_old_policy(qwen3, train):
    trainer = train(qwen3(), routing_replay_mode="R2", num_iterations=2, max_steps=2, routing_replay_load_every=1)
    (old,) = trainer.of("old policy")
    rows = old.executed[old.fed]
    busiest = [np.bincount(rows[:, layer].flatten().numpy(), minlength=EXPERTS) for layer in range(3)]
    entry = loads(trainer)[0]
    assert entry["routing_replay/load/max_over_mean"] == pytest.approx(
        max(each.max() / each.mean() for each in busiest)
    )


@pytest.mark.parametrize("changes", [{}, {"routing_replay_load_every": 0, "num_iterations": 2}])
def test_nothing_is_counted_unasked(qwen3, train, changes):
    trainer = train(qwen3(), **changes)
    names = {name for entry in trainer.state.log_history for name in entry}
    assert not [name for name in names if name.startswith("routing_replay/load")]


def test_nothing_is_said_of_rollouts_that_the_loss_leaves_out(qwen3, train):
    """All of their completions were cut: there is no load, and no expert is called dead."""
    cut = {"mask_truncated_completions": True, "generation_kwargs": {"suppress_tokens": [0, 1]}}
    assert loads(train(qwen3(), routing_replay_load_every=1, **cut)) == []


def test_a_student_logs_it_too(qwen3, tmp_path):
    trainer, _ = make_student("iw_opd", tmp_path, qwen3(), routing_replay_load_every=1)
    trainer.train()
    assert len(loads(trainer)) == 2


def test_a_negative_number_of_steps_is_refused(settings):
    with pytest.raises(ValueError, match="`routing_replay_load_every` is -1, but it counts steps"):
        settings(routing_replay_load_every=-1)


class Twin:
    """An accelerator of two processes, of which the other has counted the same."""

    num_processes, device = 2, torch.device("cpu")

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        return 2 * tensor


def test_processes_are_counted_together_where_they_meet():
    layout = RoutingLayout((0, 1), 2, 8, 2)
    record = torch.tensor([[[0, 1], [2, 3]], [[0, 4], [2, 3]], [[255, 255], [255, 255]]], dtype=torch.uint8)
    log = LoadLog(Twin(), every=5)
    for step in (0, 0, 1, 5):  # 1 is not due
        log.take([Sample(0, torch.arange(4), 2, record)], layout, step)
    assert log.collect() == {}, "a log may be asked for on one process only"
    log.meet()
    log.meet()
    assert log._shared.tolist() == [[12, 6, 0, 0, 6, 0, 0, 0], [0, 0, 12, 12, 0, 0, 0, 0]]
    assert log.collect()["routing_replay/load/layer_1/dead_experts"] == 6 and log.collect() == {}


def test_it_can_be_asked_for_when_the_trainer_is_built(qwen3, build):
    trainer = build(qwen3())
    trainer.args.routing_replay_load_every = 1
    trainer.train()
    assert len(loads(trainer)) == 2
