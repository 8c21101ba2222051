"""A packed row as a source of records: of which tokens it is, and which of its rows can be judged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trl_r3 import MisalignedRecordError, RoutingLayout
from trl_r3.records import packed_row
from trl_r3.records.packed_row import PackedRow
from trl_r3.records.prefix_tree import TreeRecord, TreeSample

SHAPE = RoutingLayout(moe_layers=(0,), num_decoder_layers=1, num_experts=100, top_k=2)
# two samples that share their first two tokens: 0 1 2 3 4 and 0 1 5 6 7 8
TOKENS = torch.tensor([10, 11, 12, 13, 14, 15, 16, 17, 18])
DEPTHS = torch.tensor([0, 1, 2, 3, 4, 2, 3, 4, 5])
PATHS = [np.array([0, 1, 2, 3, 4]), np.array([0, 1, 5, 6, 7, 8])]


def make(versions=((4, 4, 4, 4), (4, 4, 4, 4, 4)), missing=()):
    samples = []
    for i, (path, own) in enumerate(zip(PATHS, versions, strict=True)):
        rows = np.array([[[20 * i + at, 50 + at]] for at in path[:-1]], dtype=np.uint8)
        rows[[at in missing for at in path[:-1]]] = SHAPE.missing
        counts = np.ones(len(path), dtype=bool)
        samples.append(TreeSample(i, path, rows, np.array(own), counts, np.zeros(len(rows), dtype=bool)))
    return PackedRow(TOKENS, DEPTHS, TreeRecord.of(samples, len(TOKENS), SHAPE), [4, 4], 0, version=4)


def test_the_record_is_that_of_the_tokens():
    row = make()
    record = row.take(1, 9, TOKENS[None])
    assert record.shape == (1, 9, 1, 2)
    assert record[0, :, 0, 0].tolist() == [0, 1, 2, 3, 255, 25, 26, 27, 255]
    moved = TOKENS.roll(1)[None]
    with pytest.raises(MisalignedRecordError, match=r"9 of 9 tokens .* position 0: 18 instead of 10"):
        row.take(1, 9, moved)
    with pytest.raises(MisalignedRecordError, match="1 x 8 tokens with the record of a packed row of 9"):
        row.take(1, 8, TOKENS[None, :8])
    assert row.take(1, 9).shape == (1, 9, 1, 2)  # a forward from embeddings


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1, 2, 6]),
        ({"versions": ((4, 4, 4, 3), (4, 4, 4, 4, 4))}, [1, 6]),
        ({"versions": ((3, 4, 4, 4), (4, 4, 4, 4, 4))}, None),
        ({"versions": ((4, 4, -1, 4), (4, 4, 4, 4, 4))}, [6]),
        ({"missing": (6,)}, [1, 2]),
    ],
    ids=["all", "stale end", "stale root", "across an update", "missing"],
)
def test_rows_that_can_be_judged(changes, expected):
    """Recorded at the weights of the forward, as all before them, between rows of the same sample that are."""
    row = make(**changes)
    row.take(1, 9, TOKENS[None])
    assert (row.observed if expected is None else row.observed.tolist()) == expected
    assert int(row.fresh.sum()) <= int(row.recorded.sum())


def test_nothing_is_judged_at_other_weights():
    row = make()
    row.version = None
    row.take(1, 9, TOKENS[None])
    assert row.observed is None and not row.fresh.any() and int(row.recorded.sum()) == 7


def test_what_is_observed_is_held_against_the_rows_around_it(monkeypatch):
    row = make()
    row.take(1, 9, TOKENS[None])
    live = torch.zeros(3, 1, 2)
    row.observe(live)
    (seen,) = row.observations
    assert seen.sample.tolist() == [0, 0, 1]
    assert seen.recorded[:, 0, 0].tolist() == [1, 2, 26]
    assert seen.before[:, 0, 0].tolist() == [0, 1, 25]
    assert seen.after[:, 0, 0].tolist() == [2, 3, 27]
    monkeypatch.setattr(packed_row, "_OBSERVED", 2)
    row.take(1, 9, TOKENS[None])
    assert row.observed.tolist() == [1, 6]
