"""While a batch is traced, every row with a record is counted once, live and recorded, and the alarm sees its own."""

from __future__ import annotations

import pytest
import torch
from oracles import some_rows

from trl_r3 import RoutingLayout
from trl_r3.records.samples import Sample, ScoredBatch
from trl_r3.traces.counted_batch import CountedBatch

LAYOUT = RoutingLayout(moe_layers=(0, 2, 3), num_decoder_layers=4, num_experts=100, top_k=2)
PROMPT_WIDTH, WIDTH = 4, 30
LENGTHS = [(2, 20), (4, 9), (1, 26)]  # of prompts and completions


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    made = [Sample(i, torch.arange(p + c), p, some_rows(p + c - 1, generator)) for i, (p, c) in enumerate(LENGTHS)]
    made[0].record[5] = LAYOUT.missing
    return made


def counts(ids_MLK):
    return torch.stack([torch.bincount(ids_MLK[:, layer].flatten().long(), minlength=100) for layer in range(3)])


def live_of(record):
    """Other experts than those of the record, told by them."""
    return (record.long() + 1) % 100


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("observes", [False, True])
def test_rows_with_a_record_are_counted_once(samples, size, observes):
    batch = CountedBatch(ScoredBatch(samples, PROMPT_WIDTH, LAYOUT, observes=observes))
    plain = ScoredBatch(samples, PROMPT_WIDTH, LAYOUT, observes=observes)
    for start in range(0, 3, size):
        taken = batch.take(min(size, 3 - start), WIDTH)
        assert torch.equal(taken, plain.take(min(size, 3 - start), WIDTH))
        rows = taken.flatten(0, 1)
        assert torch.equal(batch.observed, (rows[:, 0, 0] != LAYOUT.missing).nonzero()[:, 0])
        batch.observe(live_of(rows[batch.observed]))
        if observes:
            plain.observe(live_of(rows[plain.observed]))
    whole = torch.cat([sample.record[sample.record[:, 0, 0] != LAYOUT.missing] for sample in samples])
    assert len(whole) == sum(p + c - 1 for p, c in LENGTHS) - 1
    assert torch.equal(batch.recorded_LE, counts(whole))
    assert torch.equal(batch.live_LE, counts(live_of(whole)))
    assert batch.sizes == [(min(size, 3 - start), WIDTH) for start in range(0, 3, size)]
    seen, expected = batch.batch.observations, plain.observations
    assert len(seen) == len(expected) == (len(batch.sizes) if observes else 0)
    for one, other in zip(seen, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(vars(one).values(), vars(other).values(), strict=True))


def test_a_forward_without_any_record_asks_for_nothing(samples):
    for sample in samples:
        sample.record.fill_(LAYOUT.missing)
    batch = CountedBatch(ScoredBatch(samples, PROMPT_WIDTH, LAYOUT))
    batch.take(3, WIDTH)
    assert batch.observed is None
    assert not batch.recorded_LE.any() and not batch.live_LE.any()
