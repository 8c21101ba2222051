"""Sequences in one row: found by positions that begin again, each with the rows of its own sample."""

from __future__ import annotations

import pytest
import torch
from oracles import some_rows

from trl_r3 import MisalignedRecordError, RoutingLayout
from trl_r3.records.samples import Sample, ScoredBatch
from trl_r3.records.unpadded_rows import join_records, recorded_rows, sequence_lengths, unpadded_positions
from trl_r3.routers.patches import take_rows

LAYOUT = RoutingLayout((0, 1, 2), 3, 100, 2)
EQUAL = torch.arange(5, 11)  # tokens of two samples whose routes differ


def samples(*tokens):
    random = torch.Generator().manual_seed(0)
    return [Sample(7 + i, ids, 2, some_rows(len(ids) - 1, random)) for i, ids in enumerate(tokens)]


def positions(*lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize(
    ("position_ids", "lengths"),
    [
        (positions(3, 1, 4), [3, 1, 4]),
        (positions(8), [8]),
        (positions(3, 5).int(), [3, 5]),
        (None, None),
        (torch.tensor([[1, 1, 0, 1, 2, 3, 4, 5]]), None),  # padded on the left, as `generate` counts
        (torch.tensor([[0, 1, 2, 0, 1, 3, 4, 5]]), None),  # a hole
        (positions(8).expand(3, 1, 8), None),  # of three dimensions
        (positions(7), None),
    ],
)
def test_lengths(position_ids, lengths):
    assert sequence_lengths(position_ids, 1, 8) == lengths


def test_padded_rows_are_not_packed():
    assert sequence_lengths(positions(8).expand(2, 8), 2, 8) is None


@pytest.mark.parametrize("left", [True, False])
def test_a_padded_row_whose_padding_has_position_0_stays_padded(left):
    """One of a batch: two zeros of padding are no sequences of one token."""
    (one,) = samples(EQUAL)
    row = torch.zeros(1, 8, dtype=torch.int64)
    mask, first = row.clone(), 2 if left else 0
    row[0, first : first + 6], mask[0, first : first + 6] = EQUAL, 1
    given = {"position_ids": ((mask.cumsum(1) - 1) * mask).clamp(min=0), "attention_mask": mask}
    assert sequence_lengths(given["position_ids"], 1, 8) == ([1, 1, 6] if left else [6, 1, 1]), "the case itself"
    batch = ScoredBatch([one], 4 if left else 2, LAYOUT)
    rows = take_rows(batch, given, 1, 8, row)[0]
    assert torch.equal(rows[first : first + 5], one.record)
    assert unpadded_positions(given, 8) is None
    for unpadded in (None, torch.ones_like(mask)):
        assert unpadded_positions({**given, "attention_mask": unpadded}, 8) is given["position_ids"]


def test_equal_tokens_keep_their_own_routes():
    one, other, last = samples(EQUAL, EQUAL, EQUAL[:3])
    assert not torch.equal(one.record, other.record), "the case itself"
    batch = ScoredBatch([one, other, last], 4, LAYOUT)
    tokens = torch.cat([EQUAL, EQUAL, EQUAL[:3]])[None]
    joined = batch.take_packed([6, 6, 3], tokens)[0]
    assert torch.equal(joined[:5], one.record) and torch.equal(joined[6:11], other.record)
    assert torch.equal(joined[12:14], last.record)
    assert (joined[[5, 11, 14]] == LAYOUT.missing).all()  # a last token was never fed
    batch.check_done()
    swapped = join_records([other, one, last], [6, 6, 3], LAYOUT)[0]
    assert not torch.equal(swapped, joined), "by tokens alone they would be one"


def test_a_sequence_that_was_cut_has_the_rows_of_its_beginning():
    (one,) = samples(EQUAL)
    assert torch.equal(ScoredBatch([one], 2, LAYOUT).take_packed([4], EQUAL[None, :4])[0], one.record[:4])


def test_a_padded_row_that_is_counted_stays_padded():
    (one,) = samples(EQUAL)
    padded = torch.cat([torch.tensor([0, 0]), EQUAL])[None]
    taken = ScoredBatch([one], 4, LAYOUT).take_packed([8], padded)
    assert torch.equal(taken, ScoredBatch([one], 4, LAYOUT).take(1, 8, padded))


@pytest.mark.parametrize(
    ("lengths", "tokens", "says"),
    [
        ([6, 3], [EQUAL.flip(0), EQUAL[:3]], "sample 7: 6 tokens .* the first at position 0: 10 instead of 5"),
        ([6, 3], [EQUAL, EQUAL[:3] + 1], "sample 8: 3 tokens .* the first at position 0: 6 instead of 5"),
        ([3, 6], [EQUAL[:3], EQUAL], "sample 8: its sequence in a forward without padding has 6 tokens, .* with 3"),
    ],
)
def test_other_tokens_are_refused(lengths, tokens, says):
    batch = ScoredBatch(samples(EQUAL, EQUAL[:3]), 2, LAYOUT)
    with pytest.raises(MisalignedRecordError, match=says):
        batch.take_packed(lengths, torch.cat(tokens)[None])


def test_observed_rows_are_those_of_the_row():
    batch = ScoredBatch(samples(EQUAL, EQUAL), 4, LAYOUT, observes=True)
    rows = batch.take_packed([6, 6], torch.cat([EQUAL, EQUAL])[None])[0]
    assert batch.observed.tolist() == [1, 2, 3, 7, 8, 9]
    batch.observe(rows[batch.observed])
    (seen,) = batch.observations
    assert torch.equal(seen.live, seen.recorded) and seen.sample.tolist() == [7] * 3 + [8] * 3


def test_what_forwards_recorded_padded_or_not():
    one, other, last = samples(EQUAL, EQUAL[:4], EQUAL)
    packed = join_records([one, other], [6, 4], LAYOUT)
    padded = torch.nn.functional.pad(last.record[None], (0, 0, 0, 0, 2, 1), value=3)
    rows = recorded_rows([packed, padded], [positions(6, 4), None], [one, other, last], 4, LAYOUT)
    assert all(torch.equal(each, sample.record) for each, sample in zip(rows, (one, other, last), strict=True))
