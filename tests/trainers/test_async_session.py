"""What a session hands to each process for a loss, and the names that it swaps only while a dataloader is made."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from trl.experimental.async_grpo import async_grpo_trainer

from trl_r3.records.packed_row import PackedRow
from trl_r3.trainers.async_queue import RoutedCollator, RoutedQueueDataset
from trl_r3.trainers.async_session import AsyncReplaySession


@pytest.fixture
def session():
    """Of a main process, at version 5 of the weights."""
    args = SimpleNamespace(
        routing_replay_in_flight="live", routing_replay_max_missing=0.25, routing_replay_shared_rows="exact"
    )
    accelerator = SimpleNamespace(num_processes=1, is_main_process=True, device=torch.device("cpu"))
    state = SimpleNamespace(global_step=7)
    trainer = SimpleNamespace(args=args, accelerator=accelerator, state=state, model_version=5)
    made = AsyncReplaySession(trainer)
    with made.packing():
        pass
    return made


def a_row(sent):
    tree = SimpleNamespace(matters=4, missing=0, live=0)
    return PackedRow(torch.arange(4), torch.arange(4), tree, sent, 0)


@pytest.mark.parametrize(("synced_at", "version"), [(7, 5), (6, None), (None, None)])
def test_only_at_the_weights_of_the_server_rows_are_fresh(session, synced_at, version):
    """With several steps between two updates of the server, an older policy would look fresh."""
    session.synced_at = synced_at
    numbers = session.waiting.add([a_row([5, 3])])
    row = session._receive(numbers[0])
    assert (row.version, row.staleness) == (version, 2)


def test_each_process_gets_its_row_or_all_get_the_error(session):
    first, second, third = session.waiting.add([a_row([5]), a_row([4]), a_row([1])])
    assert [row.staleness for row in session._give(first, 2)] == [0, 1]
    session.waiting.error = ValueError("torn")
    errors = session._give(third, 2)
    assert [str(each) for each in errors] == ["torn", "torn"]
    with pytest.raises(ValueError, match="torn"):
        session._receive(third)


def test_settings_reach_the_packing(session):
    waiting = session.waiting
    assert (waiting.lets_live, waiting.max_missing, waiting.is_exact) == (True, 0.25, True)


def test_names_are_swapped_while_a_dataloader_is_made(session):
    before = vars(async_grpo_trainer).copy()
    with pytest.raises(KeyError), session.packing():
        assert async_grpo_trainer.RolloutQueueDataset.func is RoutedQueueDataset
        assert async_grpo_trainer.DataCollatorForRollout.func is RoutedCollator
        raise KeyError
    assert vars(async_grpo_trainer) == before


def test_the_end_leaves_nothing(session):
    session.waiting.add([a_row([5])])
    waiting = session.waiting
    session.end()
    assert session.waiting is None and waiting._rows == {}
    session.end()  # as where training never began
