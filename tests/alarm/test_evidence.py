"""What live routing says about a record: right ones pass, wrong ones are named, and what tells nothing is no fault."""

from __future__ import annotations

import math
import re

import pytest
import torch
from alarm_settings import judge, rounded, routes, wrong_records
from model_zoo import build_tiny

from trl_r3 import RoutingLayout
from trl_r3.alarm.evidence import RoutingEvidence
from trl_r3.records.samples import Observation

LAYOUT = RoutingLayout((0, 2, 5), 6, 16, 2)


@pytest.fixture(scope="module")
def rollout():
    """Live routes of a small Mixtral, and its record in eight bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = build_tiny("mixtral", initializer_range=0.1)
    ids = torch.randint(1, 120, (8, 132), generator=torch.Generator().manual_seed(1))
    live, layout = routes(model, ids)
    record, _ = routes(rounded(model, torch.float8_e4m3fn), ids)
    torch.set_num_threads(threads)
    assert not torch.equal(live, record)
    return live, record, layout


WORDS = {
    "one token late": "moved by one token, from layer 0 on: each row fits the token whose row stands one later",
    "one token early": "moved by one token, from layer 0 on: each row fits the token whose row stands one earlier",
    "layers rotated": r"layer 0 \(the lowest of 3 of 3\) has kappa -?0.\d\d, but fits the rows of layer 1",
    "first layer in the last": r"layer 2 \(the lowest of 1 of 3\)",
    "other samples": r"layer 0 \(the lowest of 3 of 3\) .* other tokens, or another sample",
    "half of the samples": r"4 of 8 samples .* sample 4 .* sample 7",
    "one sample of eight": r"1 of 8 samples .* sample 7 \(kappa",
    "last layer of other samples": r"layer 2 \(the lowest of 1 of 3\) .* another sample",
    "last layer constant": r"layer 2 \(the lowest of 1 of 3\) .* one constant row",
    "constant": r"layer 0 \(the lowest of 3 of 3\) .* one constant row",
}


def test_right_record_has_no_fault(rollout):
    live, record, layout = rollout
    verdict = judge(live, record, layout)
    assert verdict.fault is None and verdict.agreement > 0.5 and verdict.pooled_contrast > 0.15


@pytest.mark.parametrize("kind", WORDS)
def test_wrong_records_are_named(rollout, kind):
    live, record, layout = rollout
    verdict = judge(live, wrong_records(record)[kind], layout)
    assert verdict.fault is not None

    assert re.search(WORDS[kind], verdict.fault), verdict.fault


def observation(rows, live=None, record=None, seed=0, num_experts=16, top_k=2, layers=3):
    generator = torch.Generator().manual_seed(seed)
    made = torch.rand(rows + 2, layers, num_experts, generator=generator).argsort(-1)[..., :top_k]
    record = made if record is None else record
    return Observation(
        torch.zeros(rows).long(), record[1:-1] if live is None else live, record[1:-1], record[:-2], record[2:]
    )


def test_statistics_are_those_of_plain_loops():
    one, other = observation(40, seed=1), observation(40, seed=2)
    mixed = torch.where(
        torch.rand(40, 3, 1, generator=torch.Generator().manual_seed(3)) < 0.7, one.recorded, other.recorded
    )
    evidence = RoutingEvidence(LAYOUT)
    evidence.add(Observation(one.sample, mixed, one.recorded, one.before, one.after))
    seen = evidence.statistics()
    for layer in range(3):
        live, recorded, before, after = (
            [set(row) for row in ids[:, layer].tolist()] for ids in (mixed, one.recorded, one.before, one.after)
        )

        def overlap(record, live=live):
            return sum(len(a & b) for a, b in zip(live, record, strict=True)) / (2 * len(live))

        chance = (
            sum(sum(e in row for row in live) / 40 * sum(e in row for row in recorded) / 40 for e in range(16)) / 2
        )
        assert float(seen.agreement_L[layer]) == pytest.approx((overlap(recorded) - chance) / (1 - chance), abs=1e-12)
        contrast = overlap(recorded) - max(overlap(before), overlap(after))
        assert float(seen.contrast_L[layer]) == pytest.approx(contrast, abs=1e-12)


def test_order_of_the_ids_says_nothing():
    one = observation(300)
    evidence = RoutingEvidence(LAYOUT)
    evidence.add(Observation(one.sample, one.live.flip(-1), one.recorded, one.before, one.after))
    assert evidence.verdict().agreement == 1.0


def test_few_rows_wait_for_more():
    evidence = RoutingEvidence(LAYOUT)
    wrong = observation(100, live=observation(100, seed=9).live)
    for rows in (100, 200):
        evidence.add(wrong)
        assert evidence.rows == rows and evidence.verdict() is None
    evidence.add(wrong)
    assert evidence.verdict().fault is not None
    evidence.clear()
    assert evidence.rows == 0 and evidence.verdict() is None


@pytest.mark.parametrize(("num_experts", "top_k"), [(16, 1), (16, 2), (2, 2), (4, 4)])
def test_routes_that_tell_nothing_are_no_fault(num_experts, top_k):
    """Collapsed routers, and as many experts a token as there are."""
    layout = RoutingLayout((0, 2, 5), 6, num_experts, top_k)
    record = torch.arange(top_k).expand(302, 3, top_k)
    evidence = RoutingEvidence(layout)
    evidence.add(observation(300, record=record))
    verdict = evidence.verdict()
    assert verdict.fault is None
    assert math.isnan(verdict.agreement) and math.isnan(verdict.contrast)


def test_a_layer_that_nearly_collapsed_is_no_fault():
    """Two of a hundred rows leave the common selection, and rounding moves both: chance is nearly all there is."""
    record = torch.tensor([0, 1]).repeat(302, 3, 1)
    record[::50, 0] = torch.tensor([2, 3])
    live = record[1:-1].clone()
    live[:, 0] = torch.tensor([0, 1])
    evidence = RoutingEvidence(LAYOUT)
    evidence.add(observation(300, live=live, record=record))
    assert evidence.verdict().fault is None


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_shaken_routers_are_no_fault(rollout, share):
    """Dropout or jitter: every so many slots of the live selection are another expert."""
    live, record, layout = rollout
    shaken = live.clone()
    generator = torch.Generator().manual_seed(0)
    hit = torch.rand(live.shape[:-1], generator=generator) < share
    shaken[hit] = torch.rand(int(hit.sum()), layout.num_experts, generator=generator).argsort(-1)[:, : layout.top_k]
    assert judge(shaken, record, layout).fault is None
