"""From the queue to packed rows: TRL's planners and collator, with the record of each token where it was packed."""

from __future__ import annotations

import dataclasses
import queue
from collections import defaultdict

import numpy as np
import pytest
import torch
from accelerate import PartialState
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.experimental.async_grpo.async_grpo_trainer import (
    DataCollatorForRollout,
    FixedCountBatcher,
    RolloutQueueDataset,
    TokenBudgetBatcher,
)
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample
from trl.experimental.async_grpo.packing import TreeRow

from trl_r3 import MisalignedRecordError, RoutingLayout
from trl_r3.trainers.async_queue import ROW_NUMBER, RoutedCollator, RoutedQueueDataset, WaitingRows
from trl_r3.trainers.async_worker import RoutedSample

SHAPE = RoutingLayout(moe_layers=(0, 1), num_decoder_layers=2, num_experts=250, top_k=2)
few = settings(max_examples=25, deadline=None)


def make_waiting(max_missing=0.0, lets_live=False, is_exact=False):
    return WaitingRows(lambda: SHAPE, max_missing, lets_live, is_exact)


def sample(tokens, first=0, group=0, spans=None, **changes):
    """One whose row at position p names `first + p`."""
    rows = len(tokens) - 1
    record = np.repeat(np.arange(first, first + rows)[:, None, None], 2, 1).astype(np.uint8)
    record = np.concatenate([record, record + 100], 2)
    ids, mask = np.array(tokens, dtype=np.int64), np.arange(len(tokens)) > 0
    logprobs = -np.arange(len(tokens), dtype=np.float32)
    values = {"record": record, "spans": np.array([[rows, 3, 3]] if spans is None else spans), **changes}
    return RoutedSample([], [], ids, mask.astype(np.int64), logprobs, 0.5, 3, group, {"reward": 1.0}, None, **values)


def dataset(samples, waiting, kind=RoutedQueueDataset):
    """A queue that holds these samples, and ends there."""
    full = queue.Queue()
    for each in samples:
        full.put(each)

    def healthy(stale_after_s):
        raise StopIteration

    own = (full, lambda: 3, healthy, 1.0, defaultdict(list))
    made = kind(waiting, *own) if kind is RoutedQueueDataset else kind(*own)
    made.poll_interval_s = 0.01
    return made


def until_empty(batches):
    found = []
    with pytest.raises(RuntimeError, match="generator raised StopIteration"):
        for batch in batches:
            found.append(batch)
    return found


def packed(samples, planner, waiting, processes):
    """(the batch of TRL's own collator, that of the routed one) of each micro-batch."""
    collator = RoutedCollator(pad_token_id=0, num_processes=processes, waiting=waiting)
    pairs = []
    for rows in until_empty(planner(dataset(samples, waiting))):
        own = DataCollatorForRollout(pad_token_id=0, num_processes=processes).torch_call([rows])
        pairs.append((own, collator.torch_call([rows]), rows))
    return pairs


def planners(processes):
    return [
        lambda data: FixedCountBatcher(data, processes, 2 * processes),
        lambda data: TokenBudgetBatcher(data, processes, 12, defaultdict(list)),
    ]


def sequences(depths):
    """Positions of each sequence of a row, from a root to a leaf, depth first."""
    found, path, after = [], [], [*depths, 0]
    for at, depth in enumerate(depths):
        path = [*path[:depth], at]
        if after[at + 1] <= depth:
            found.append(path)
    return found


def check_rows(row, drawn):
    """Each position holds the row of a sample that has its token, the next one, and all before; the first in order."""
    tokens, depths = row.tokens.tolist(), row.depths.tolist()
    paths = sequences(depths)
    assert sorted({tuple(tokens[at] for at in path) for path in paths}) == sorted({tuple(s.input_ids) for s in drawn})
    for path in paths:
        own = [tokens[at] for at in path]
        for depth, at in enumerate(path[:-1]):
            having = [s for s in drawn if s.input_ids[: depth + 2].tolist() == own[: depth + 2]]
            assert np.array_equal(row.tree.rows[at].numpy(), having[0].record[depth])
        assert (row.tree.rows[path[-1]] == SHAPE.missing).all()


@st.composite
def drawn_samples(draw):
    tokens = st.lists(st.integers(1, 2), min_size=2, max_size=7)
    return [sample(draw(tokens), first=7 * i, group=draw(st.integers(0, 2))) for i in range(draw(st.integers(4, 9)))]


@few
@given(drawn_samples(), st.integers(1, 2), st.integers(0, 1))
def test_rows_are_where_trl_packs_their_tokens(drawn, processes, which):
    waiting = make_waiting()
    pairs = packed(drawn, planners(processes)[which], waiting, processes)
    seen = 0
    for own, batch, rows in pairs:
        assert own.keys() | {ROW_NUMBER} == batch.keys()
        assert all(torch.equal(own[name], batch[name]) for name in own)
        numbers = batch[ROW_NUMBER].tolist()
        assert numbers == list(range(seen, seen + processes))
        seen += processes
        for number, tree_row, ids, mask in zip(
            numbers, rows, batch["input_ids"], batch["attention_mask"], strict=True
        ):
            (row,) = waiting.take(number, 1)
            assert torch.equal(row.tokens, ids[mask.bool()])
            by_number = {tuple(each["routes"].record.ravel()): each for each in tree_row.samples}
            in_row = [each for each in drawn if tuple(each.record.ravel()) in by_number]
            order = [tuple(each["routes"].record.ravel()) for each in tree_row.samples]
            check_rows(row, sorted(in_row, key=lambda s: order.index(tuple(s.record.ravel()))))
            assert (row.tree.missing, row.spanning, row.sent) == (0, 0, [3] * len(in_row))


def test_rows_in_the_order_of_the_nodes_are_seen(monkeypatch):
    drawn = [sample([1, 2, 1, 1, 2], 0), sample([1, 2, 2, 1, 2], 50), sample([1, 2, 1, 1, 1, 1], 100)]
    waiting = make_waiting()
    tree_row = TreeRow()
    for example in dataset_examples(drawn, waiting):
        tree_row.add(example)
    collator = RoutedCollator(pad_token_id=0, waiting=waiting)
    check_rows(waiting.take(int(collator.torch_call([[tree_row]])[ROW_NUMBER]), 1)[0], drawn)
    own = RoutedCollator._packed

    def unordered(self, row, order, *args):
        return own(self, row, np.arange(len(order)), *args)

    monkeypatch.setattr(RoutedCollator, "_packed", unordered)
    with pytest.raises(AssertionError):
        check_rows(waiting.take(int(collator.torch_call([[tree_row]])[ROW_NUMBER]), 1)[0], drawn)


def dataset_examples(samples, waiting):
    return until_empty(dataset(samples, waiting))


@few
@given(drawn_samples(), st.integers(0, 1))
def test_rows_that_differ_are_not_shared(drawn, which):
    """All of these samples have rows of their own, but for twins of each, which share all of it."""
    twins = [dataclasses.replace(each, record=each.record[:, :, ::-1].copy()) for each in drawn]
    both = [each for pair in zip(drawn, twins, strict=True) for each in pair]
    waiting = make_waiting(is_exact=True)
    for _, batch, rows in packed(both, planners(1)[which], waiting, 1):
        (row,) = waiting.take(int(batch[ROW_NUMBER]), 1)
        assert row.tree.conflicts == 0
        mask = batch["attention_mask"][0].bool()
        assert torch.equal(row.tokens, batch["input_ids"][0][mask]) and int(row.tokens.max()) <= 2
        labels = batch["shift_labels"][0]
        assert set(labels.tolist()) <= {-100, 1, 2}
        paths = sequences(row.depths.tolist())
        there = sorted((tuple(row.tokens[p].tolist()), row.tree.rows[p[:-1]].sort(-1).values.tolist()) for p in paths)
        ordered = [np.sort(each["routes"].record, -1).tolist() for each in rows[0].samples]
        ids = [tuple(each["input_ids"] & 0xFFFFFF) for each in rows[0].samples]
        assert {(tokens, str(record)) for tokens, record in there} == set(zip(ids, map(str, ordered), strict=True))
        following = {before: after for path in paths for before, after in zip(path, path[1:], strict=False)}
        for at, label in enumerate(labels[mask].tolist()):
            assert label == -100 if at not in following else label == int(row.tokens[following[at]])


def test_shared_rows_conflict_unless_they_are_told_apart():
    drawn = [sample([1, 2, 1, 1], 0), sample([1, 2, 1, 2], 50)]
    for is_exact, tokens, conflicts in ((False, 6, 2), (True, 8, 0)):
        waiting = make_waiting(is_exact=is_exact)
        pack_alone(drawn, waiting)
        (row,) = waiting.take(0, 1)
        assert (len(row.tokens), row.tree.conflicts) == (tokens, conflicts)


def test_what_trl_reads_of_a_sample_is_left_alone():
    waiting = make_waiting()
    drawn = [sample([1, 2, 3]), sample([1, 2], first=9)]
    ours, plain = dataset_examples(drawn, waiting), until_empty(dataset(drawn, waiting, RolloutQueueDataset))
    assert [{**each, "routes": None} for each in plain] == [{**each, "routes": None} for each in ours]
    assert [each["routes"].identity for each in ours] == [0, 1]


@pytest.fixture
def loggers_speak():
    """Accelerate's need a state, which a trainer makes."""
    PartialState()


@pytest.mark.usefixtures("loggers_speak")
def test_stale_samples_are_dropped_with_their_records():
    waiting = make_waiting()
    old = sample([1, 2, 3], first=30)
    old.model_version = -9
    examples = dataset_examples([old, sample([4, 5], first=60)], waiting)
    assert [each["routes"].record[0, 0, 0] for each in examples] == [60]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fault": "answer 3 is torn"}, "cannot be used: answer 3 is torn"),
        ({"record": np.zeros((1, 2, 2), np.uint8)}, "sample 0: the record has 1 rows for 3 tokens, expected 2"),
        ({"record": None}, "sample 0: the record has 0 rows for 3 tokens"),
    ],
)
def test_a_fault_is_raised_when_a_row_is_taken(changes, words):
    """Not in the queue: there the main process is alone, and the others would wait for it."""
    waiting = make_waiting()
    examples = dataset_examples([sample([1, 2, 3], **changes), sample([1, 2])], waiting)
    assert len(examples) == 2
    with pytest.raises(ValueError, match=words):
        waiting.take(0, 1)


def test_a_sample_of_another_worker_is_named():
    waiting = make_waiting()
    ids = np.arange(3)
    own = RolloutSample([], [], ids, np.ones_like(ids), np.zeros(3, np.float32), 0.5, 3, 7, {"reward": 1.0})
    dataset_examples([own], waiting)
    with pytest.raises(ValueError, match="sample 0 is a RolloutSample without one. Let R3AsyncGRPOTrainer build"):
        waiting.take(0, 1)


def pack_alone(drawn, waiting):
    row = TreeRow()
    for example in dataset_examples(drawn, waiting):
        row.add(example)
    return RoutedCollator(pad_token_id=0, waiting=waiting).torch_call([[row]])


def gaps(tokens, at, **changes):
    made = sample(tokens, **changes)
    made.record[at] = SHAPE.missing
    return made


def test_missing_rows_are_an_error_unless_they_are_allowed():
    drawn = [gaps([1, 2, 3, 4, 5], [1]), sample([6, 7, 8], first=40)]
    waiting = make_waiting()
    pack_alone(drawn, waiting)
    with pytest.raises(RuntimeError, match=r"1 of 6 tokens .* have no record, .* allows 0.00%"):
        waiting.take(0, 1)
    allowed = make_waiting(max_missing=0.2)
    pack_alone(drawn, allowed)
    (row,) = allowed.take(0, 1)
    assert (row.tree.matters, row.tree.missing) == (6, 1)


def test_requests_across_an_update():
    """Replayed or not, they are counted; rows that are to go live are no error."""
    drawn = [sample([1, 2, 3, 4, 5], spans=[[2, 3, 3], [2, 3, 4]]), sample([1, 2, 9], first=40)]
    for lets_live, missing in ((False, 0), (True, 2)):
        waiting = make_waiting(lets_live=lets_live)
        pack_alone(drawn, waiting)
        (row,) = waiting.take(0, 1)
        assert (row.spanning, row.sent) == (1, [3, 3])
        assert (row.tree.missing, row.tree.live) == (missing, missing)
        # the second token is followed by another one in each sample
        assert row.tree.versions.tolist() == [3, 3, -1, -1, -1, 3, -1]
    assert row.tree.owners.tolist() == [0, 0, -1, -1, -1, 1, -1]


def test_a_row_is_taken_once():
    waiting = make_waiting()
    batch = pack_alone([sample([1, 2, 3])], waiting)
    assert waiting.take(int(batch[ROW_NUMBER]), 1)
    with pytest.raises(MisalignedRecordError, match="names packed row 0, but 0 of 1 rows wait"):
        waiting.take(0, 1)
    pack_alone([sample([1, 2, 3])], waiting)
    waiting.drop()
    with pytest.raises(MisalignedRecordError, match="names packed row 1, but 0 of 2"):
        waiting.take(1, 1)


def test_trl_packs_once_and_gets_its_tokens_back(monkeypatch):
    waiting, calls, row, own = make_waiting(), [], TreeRow(), TreeRow.pack
    for example in dataset_examples([sample([1, 2, 3]), sample([1, 2, 4], first=9)], waiting):
        row.add(example)
    tokens = list(row.tokens)
    monkeypatch.setattr(TreeRow, "pack", lambda self: calls.append(self) or own(self))
    RoutedCollator(pad_token_id=0, waiting=waiting).torch_call([[row]])
    assert calls == [row] and row.tokens == tokens
