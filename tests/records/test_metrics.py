"""How far selections and probabilities disagree, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from trl_r3 import changed_router_frac, changed_token_frac, extreme_token_frac, k3_kl
from trl_r3.records.metrics import ReplayStats, changed_layers, drawn_logprobs, expert_load, shared_experts


def selections(seed, *size, experts=6, top_k=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*size, experts, generator=generator).argsort(-1)[..., :top_k]


@pytest.fixture
def scored():
    """(B, C) log-probabilities of training and rollout, which tokens count, and these by themselves."""
    generator = torch.Generator().manual_seed(0)
    train = -3 * torch.rand(3, 40, generator=generator)
    rollout = train + 0.8 * torch.randn(3, 40, generator=generator)
    mask = torch.rand(3, 40, generator=generator) < 0.7
    rollout[mask.nonzero()[0, 0], mask.nonzero()[0, 1]] = float("nan")  # the engine could not score it
    counted = mask & ~rollout.isnan()
    assert counted.sum() == mask.sum() - 1
    return train, rollout, mask, list(zip(train[counted].tolist(), rollout[counted].tolist(), strict=True))


def test_k3(scored):
    train, rollout, mask, counted = scored
    expected = [math.exp(t - r) - 1 - (t - r) for t, r in counted]
    assert float(k3_kl(train, rollout, mask)) == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert min(expected) >= 0 and float(k3_kl(train, train, mask)) == 0
    assert float(k3_kl(rollout, train, mask.float())) != pytest.approx(sum(expected) / len(expected), rel=0.01)


def test_k3_estimates_the_divergence_from_the_rollout():
    """And not the other one: the wrong sign has another expectation."""
    rollout, train = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.2, 0.3, 0.5]).log()
    drawn = torch.tensor([0] * 7000 + [1] * 2000 + [2] * 1000)  # as often as the rollout does
    found = float(k3_kl(train[drawn][None], rollout[drawn][None], torch.ones(1, len(drawn))))
    assert found == pytest.approx(float((rollout.exp() * (rollout - train)).sum()), rel=1e-5)
    assert found != pytest.approx(float((train.exp() * (train - rollout)).sum()), rel=0.05)


@pytest.mark.parametrize("tau", [1.1, 2.0, 5.0])
def test_extreme_tokens(scored, tau):
    train, rollout, mask, counted = scored
    ratios = [math.exp(t - r) for t, r in counted]
    expected = sum(max(ratio, 1 / ratio) > tau for ratio in ratios) / len(ratios)
    assert float(extreme_token_frac(train, rollout, mask, tau)) == pytest.approx(expected)
    if tau == 2.0:
        assert float(extreme_token_frac(train, rollout, mask)) == pytest.approx(expected)
        assert 0 < expected < 1


def test_no_token_is_no_number(scored):
    train, rollout, mask, _ = scored
    assert k3_kl(train, rollout, torch.zeros_like(mask)).isnan()
    assert extreme_token_frac(train, torch.full_like(rollout, float("nan")), mask).isnan()


def test_changed_fractions():
    """The order of ids says nothing, and missing rows do not count."""
    live, recorded = selections(1, 2, 9, 3), selections(2, 2, 9, 3)
    recorded[:, 3:6] = live[:, 3:6].flip(-1)
    recorded[1, 8] = -1
    routers, tokens = [], []
    for b in range(2):
        for t in range(9):
            if (b, t) != (1, 8):
                changed = [set(a) != set(b) for a, b in zip(live[b, t].tolist(), recorded[b, t].tolist(), strict=True)]
                routers += changed
                tokens.append(any(changed))
    assert 0 < sum(routers) < len(routers) and 0 < sum(tokens) < len(tokens)
    assert float(changed_router_frac(live, recorded)) == pytest.approx(sum(routers) / len(routers))
    assert float(changed_token_frac(live, recorded)) == pytest.approx(sum(tokens) / len(tokens))
    assert changed_router_frac(live, torch.full_like(recorded, -1)).isnan()


def test_shared_experts_are_counted():
    one, other = selections(3, 50, 2, experts=5, top_k=3), selections(4, 50, 2, experts=5, top_k=3)
    pairs = zip(one.flatten(0, 1).tolist(), other.flatten(0, 1).tolist(), strict=True)
    expected = torch.tensor([len(set(a) & set(b)) for a, b in pairs]).reshape(50, 2)
    assert torch.equal(shared_experts(one, other.to(torch.uint8)), expected)
    assert torch.equal(changed_layers(one, other), expected < 3)


def test_drawn_logprobs_are_over_what_could_be_drawn():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    logits[1, [0, 2, 5]] = -torch.inf
    tokens = torch.tensor([6, 3, 0, 1], dtype=torch.int32)
    expected = [
        math.log(math.exp(row[t]) / sum(map(math.exp, row))) for row, t in zip(logits.tolist(), tokens, strict=True)
    ]
    assert drawn_logprobs(logits, tokens).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_load_of_experts(dtype):
    ids = selections(5, 30, 2)
    load = expert_load(ids.to(dtype), 8)
    expected = [[int((ids[:, layer] == expert).sum()) for expert in range(8)] for layer in range(2)]
    assert load.tolist() == expected and load[:, 6:].eq(0).all()


def test_counts_of_a_replay():
    """Rows with a record count as recorded, and those of them that are attended to as compared."""
    changed = torch.tensor([[True, False], [True, True], [False, False], [False, True]])
    recorded, attended = torch.tensor([True, True, True, False]), torch.tensor([True, False, True, True])
    stats = ReplayStats()
    stats.add(changed, recorded, attended)
    stats.add(changed, recorded, None)
    assert stats.forwards == 2
    assert (int(stats.recorded_tokens), int(stats.compared_tokens)) == (6, 5)
    assert stats.changed_by_layer.tolist() == [1 + 2, 0 + 1]
    assert (int(stats.changed_routers), int(stats.changed_tokens)) == (4, 3)
