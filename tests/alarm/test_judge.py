"""What tells a record of other tokens from a right one, at the weights of the rollout.

Legend: B batch, T tokens of a sequence, M observed rows, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from misrouted import OF_LAYERS, OF_SAMPLES, Bench, constant, engine_of, other_sample, record_of
from model_zoo import build_tiny

from trl_r3 import RoutingLayout
from trl_r3.alarm.evidence import RoutingEvidence
from trl_r3.records.samples import Observation

# 2 of 8 experts in two layers, the least that a model has; a dense layer below, groups of experts; one of many experts
MODELS = {
    "qwen3_moe": {"num_hidden_layers": 2, "mlp_only_layers": []},
    "deepseek_v3": {"num_hidden_layers": 4, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "olmoe": {"num_experts": 64, "num_experts_per_tok": 1, "num_key_value_heads": 4},
}


@pytest.fixture(scope="module", params=MODELS)
def bench(request):
    """8 x 140 tokens: 1,096 rows, and more than 250 (row, layer) pairs of a sample."""
    generator = torch.Generator().manual_seed(2)
    return Bench(
        build_tiny(request.param, **MODELS[request.param]), torch.randint(1, 128, (8, 140), generator=generator)
    )


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def right(bench, request):
    """The record of a rollout in less precision."""
    return record_of(engine_of(bench.model, request.param), bench.tokens)


def test_a_right_record(bench, right):
    assert not torch.equal(right, record_of(bench.model, bench.tokens))  # the rollout did route otherwise
    verdict = bench.verdict(right)
    assert verdict.fault is None
    assert verdict.agreement > 0.7 and verdict.contrast > 0.1 and verdict.pooled_contrast >= verdict.contrast


@pytest.mark.parametrize("wrong", OF_LAYERS + OF_SAMPLES, ids=lambda wrong: wrong.__name__)
def test_a_wrong_record_is_named(bench, right, wrong):
    replay, _ = bench.observe(right)
    record, pattern = wrong(right, replay.moe_layers)
    fault = bench.verdict(record).fault
    assert fault is not None and re.search(pattern, fault), fault
    assert "1096 rows" in fault and "routing_replay_alarm" in fault


def test_overlap_alone_cannot_tell():
    """The wrong variant: of routers that favour experts, the overlap with any record is that of a right one."""
    favoured, balanced = observation(favour=16.0), observation(noise=0.4)
    favoured.recorded = favoured.recorded.roll(37, 0)
    favoured.before, favoured.after = favoured.recorded.roll(1, 0), favoured.recorded.roll(-1, 0)
    overlap = [in_sets(each.live, each.recorded).mean() for each in (favoured, balanced)]
    assert overlap[0] > overlap[1]
    assert judge(favoured).fault is not None and judge(balanced).fault is None


# Invented routes


def observation(rows=512, layers=3, experts=16, top_k=2, noise=0.1, favour=0.0, seed=0):
    """Rows of 8 samples, recorded by a router that `noise` shakes, and that favours low ids by `favour`."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows + 2, layers, experts, generator=generator)
    scores -= torch.arange(experts) * favour / experts
    live = scores.topk(top_k).indices
    recorded = (scores + noise * torch.randn(scores.shape, generator=generator)).topk(top_k).indices
    sample = torch.arange(rows) * 8 // rows
    return Observation(sample, live[1:-1], recorded[1:-1], recorded[:-2], recorded[2:])


def layout_of(seen, experts=16):
    layers = seen.live.shape[1]
    return RoutingLayout(tuple(range(1, layers + 1)), layers + 1, experts, seen.live.shape[2])


def judge(*seen, experts=16):
    evidence = RoutingEvidence(layout_of(seen[0], experts))
    for each in seen:
        evidence.add(each)
    return evidence.verdict()


def in_sets(one, other):
    """(M, L) numbers of shared ids, one row after the other."""
    pairs = zip(one.flatten(0, 1).tolist(), other.flatten(0, 1).tolist(), strict=True)
    return torch.tensor([len(set(a) & set(b)) for a, b in pairs], dtype=torch.float64).reshape(one.shape[:2])


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (8, 2), (16, 15), (128, 8), (512, 10)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_statistics_are_those_of_plain_loops(experts, top_k, dtype):
    if dtype == torch.uint8 and experts > 256:
        dtype = torch.int32
    seen = observation(300, 4, experts, top_k, noise=0.3, favour=3.0)
    seen.recorded, seen.before, seen.after = (x.to(dtype) for x in (seen.recorded, seen.before, seen.after))
    verdict = judge(seen, experts=experts)
    rows, layers, _ = seen.live.shape
    own, before, after = (in_sets(seen.live, x).mean(0) / top_k for x in (seen.recorded, seen.before, seen.after))
    for layer in range(layers):
        chance = 0.0
        for expert in range(experts):
            live = sum(expert in row for row in seen.live[:, layer].tolist())
            recorded = sum(expert in row for row in seen.recorded[:, layer].tolist())
            chance += live / rows * recorded / rows / top_k
        kappa = (own[layer].item() - chance) / (1 - chance)
        if math.isnan(verdict.agreement_L[layer]):
            assert (
                1 - sum((seen.live[:, layer] == e).any(-1).double().mean() ** 2 for e in range(experts)) / top_k < 0.1
            )
        else:
            assert verdict.agreement_L[layer].item() == pytest.approx(kappa, abs=1e-12)
        contrast = own[layer] - max(before[layer], after[layer])
        assert verdict.contrast_L[layer].item() == pytest.approx(contrast.item(), abs=1e-12)
    assert verdict.pooled_contrast == pytest.approx((own.mean() - max(before.mean(), after.mean())).item(), abs=1e-12)
    assert verdict.fault is None


def test_the_order_of_ids_says_nothing():
    seen = observation(top_k=4)
    flipped = Observation(seen.sample, seen.live, seen.recorded.flip(-1), seen.before.roll(1, -1), seen.after)
    assert torch.equal(judge(seen).agreement_L, judge(flipped).agreement_L)
    assert torch.equal(judge(seen).contrast_L, judge(flipped).contrast_L)


def test_few_rows_wait_for_more():
    seen = observation()
    part = [Observation(*(column[i : i + 128] for column in vars(seen).values())) for i in range(0, 512, 128)]
    evidence = RoutingEvidence(layout_of(seen))
    for count, each in enumerate(part, start=1):
        evidence.add(each)
        assert evidence.rows == 128 * count
        assert (evidence.verdict() is None) == (count == 1)
        assert evidence.statistics().fault is None
    assert torch.equal(evidence.verdict().agreement_L, judge(seen).agreement_L)
    evidence.clear()
    assert evidence.rows == 0 and evidence.verdict() is None


# Where nothing can be told


def constant_rows(ids, rows=512, layers=3):
    return torch.tensor(ids).expand(rows, layers, len(ids)).clone()


def same_everywhere(live, recorded):
    return Observation(torch.arange(512) // 64, live, recorded, recorded, recorded)


@pytest.mark.parametrize("recorded", [[0, 1], [0, 2], [5, 6]], ids=["the same", "rounded otherwise", "others"])
def test_collapsed_routers(recorded):
    verdict = judge(same_everywhere(constant_rows([0, 1]), constant_rows(recorded)))
    assert verdict.fault is None
    assert all(map(math.isnan, (verdict.agreement, verdict.contrast, verdict.pooled_contrast)))


def test_all_experts():
    every = torch.stack([torch.randperm(4) for _ in range(512 * 3)]).reshape(512, 3, 4)
    seen = Observation(torch.arange(512) // 64, every, every.flip(-1), every.roll(1, -1), every)
    verdict = judge(seen, experts=4)
    assert verdict.fault is None and math.isnan(verdict.agreement) and math.isnan(verdict.contrast)


def test_nearly_collapsed_routers():
    """What varies is what rounding decides: each side strays from the same experts, by itself."""
    live, recorded = constant_rows([0, 1]), constant_rows([0, 1])
    live[::40, :, 1] = 2
    recorded[5::40, :, 1] = 2
    seen = Observation(torch.arange(512) // 64, live, recorded, recorded.roll(1, 0), recorded.roll(-1, 0))
    assert in_sets(live, recorded).mean() < 2
    assert judge(seen).fault is None


@pytest.mark.parametrize("ids", [[0, 1], [0, 1, 2, 3]])
def test_half_collapsed_routers(ids):
    """Rounding moves the edge of the top-k by the same amount for all tokens: kappa is that of other tokens."""
    x = torch.rand(512, 3, generator=torch.Generator().manual_seed(0))
    live, recorded = constant_rows(ids), constant_rows(ids)
    live[..., -1] += x > 0.3
    recorded[..., -1] += x > 0.9
    seen = Observation(torch.arange(512) // 64, live, recorded, recorded.roll(1, 0), recorded.roll(-1, 0))
    verdict = judge(seen)
    assert verdict.agreement < 0.2 and verdict.fault is None


def test_half_collapsed_routers_of_a_model(monkeypatch):
    """The tokens have more in common than what tells them apart."""
    sizes = {"num_experts": 64, "num_local_experts": 64, "num_experts_per_tok": 8, "mlp_only_layers": []}
    model = build_tiny("qwen3_moe", hidden_size=64, num_hidden_layers=6, **sizes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        embeddings = model.get_input_embeddings().weight
        embeddings.mul_(0.3).add_(0.1 * torch.randn(64, generator=generator))
    bench = Bench(model, torch.randint(1, 128, (8, 100), generator=generator))
    right = record_of(engine_of(model, "fp8"), bench.tokens)
    assert bench.verdict(right).fault is None
    monkeypatch.setattr("trl_r3.alarm.judge.MIN_OVERLAP", math.inf)  # the wrong variant: kappa alone
    assert bench.verdict(right).fault is not None


@pytest.mark.parametrize("repeated", [1, 2])
def test_a_token_that_rounding_sends_elsewhere_and_a_sample_repeats(repeated):
    """Rows that are alike are one observation, however many they are."""
    seen = observation(rows=2048)
    of_sample = seen.sample == 3
    for step, token in enumerate(range(repeated)):
        rows = of_sample.nonzero()[step::repeated, 0]
        for name in ("recorded", "before", "after"):
            getattr(seen, name)[rows] = torch.tensor([token, 8 + token])
        seen.live[rows] = torch.tensor([token, 12 + token])
        seen.live[rows, 0] = torch.tensor([4 + token, 12 + token])
    assert judge(seen).fault is None


# Which fault is named


def test_a_wrong_layer_of_two_is_no_wrong_sample():
    seen, other = observation(layers=2, rows=2048), observation(layers=2, rows=2048, seed=1)
    for name in ("recorded", "before", "after"):
        getattr(seen, name)[:, 0] = getattr(other, name)[:, 0]
    assert re.search(r"layer 1 \(the lowest.*other tokens", judge(seen).fault)


def test_wrong_samples_are_no_wrong_layer():
    """Half of a batch: every layer is near the bound."""
    seen, other = observation(rows=2048), observation(rows=2048, seed=1)
    swapped = seen.sample % 2 == 1
    for name in ("recorded", "before", "after"):
        getattr(seen, name)[swapped] = getattr(other, name)[swapped]
    verdict = judge(seen)
    assert 0.3 < verdict.agreement < 0.6
    assert re.search("4 of 8 samples .*sample 1 .*sample 3 .*sample 5 .*sample 7 ", verdict.fault)
    assert "(the lowest of" not in verdict.fault


def test_short_samples_are_judged_over_their_layers():
    """Of 64 samples with 8 rows each, in 48 layers, one is wrong."""
    seen, other = observation(layers=48), observation(layers=48, seed=1)
    seen.sample = torch.arange(512) // 8
    for name in ("recorded", "before", "after"):
        getattr(seen, name)[seen.sample == 17] = getattr(other, name)[seen.sample == 17]
    assert judge(seen).agreement > 0.8
    assert "1 of 64 samples" in judge(seen).fault and "sample 17 (kappa" in judge(seen).fault


def test_many_samples_are_not_all_named():
    seen, other = observation(layers=48), observation(layers=48, seed=1)
    seen.sample = torch.arange(512) // 8
    for name in ("recorded", "before", "after"):
        getattr(seen, name)[seen.sample < 20] = getattr(other, name)[seen.sample < 20]
    fault = judge(seen).fault
    assert "20 of 64 samples" in fault and re.search(r"sample 7 \(kappa [^)]*\) and 12 more", fault)


def test_moved_further_than_a_token():
    """Neighbours alike: moved by two, the row in between fits better, though it does not fit."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(600, 3, 16, generator=generator)
    smooth = scores[:-3] + 2 * scores[1:-2] + 2 * scores[2:-1] + scores[3:]
    ids = smooth.topk(2).indices
    seen = Observation(torch.arange(590) // 74, ids[4:594], ids[2:592], ids[1:591], ids[3:593])
    fault = judge(seen).fault
    assert fault is not None and "other tokens" in fault


def test_other_weights():
    """An engine that was not given the weights: its routes are those of the tokens, though not of this router."""
    fault = judge(observation(noise=1.2)).fault
    assert fault is not None and re.search(
        r"layer 1 \(the lowest.*fits its tokens better than the next ones: of other weights", fault
    )


def test_the_wrong_records_are_wrong(bench, right):
    """Or the tests above could pass for another reason."""
    replay, _ = bench.observe(right)
    for wrong in (constant, other_sample):
        record, _ = wrong(right, replay.moe_layers)
        assert in_sets(record.flatten(0, 1), right.flatten(0, 1)).mean() < 0.7 * replay.top_k
