"""The load of experts, against counts by hand on the host."""

from __future__ import annotations

import math

import pytest
import torch

from trl_r3 import ExpertLoad


def some_ids(shape=(3, 40, 5), experts=12, top_k=3, dtype=torch.int64):
    """(B, T, L, K) distinct ids of a row, of the first experts more often."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.linspace(1.0, 0.02, experts).expand(math.prod(shape), experts)
    return torch.multinomial(weights, top_k, generator=generator).view(*shape, top_k).to(dtype)


def by_hand(ids, experts):
    layers = ids.shape[-2]
    counts = [[0] * experts for _ in range(layers)]
    for row in ids.flatten(0, -3).tolist():
        for layer, chosen in enumerate(row):
            for expert in chosen if chosen[0] != -1 else ():
                counts[layer][expert] += 1
    return counts


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_counts_are_those_of_the_host(dtype):
    ids = some_ids(dtype=dtype)
    ids[1, 30:] = -1  # missing rows
    load = ExpertLoad.of(ids, 12)
    assert load.counts_LE.tolist() == by_hand(ids, 12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_counts_as_the_host_does():
    ids = some_ids()
    assert torch.equal(ExpertLoad.of(ids.cuda(), 12).counts_LE.cpu(), ExpertLoad.of(ids, 12).counts_LE)


@pytest.mark.parametrize(("outside", "dtype"), [(4, torch.uint8), (9, torch.int16), (-2, torch.int64)])
def test_experts_of_another_model_are_refused(outside, dtype):
    """On a device they would count for the next layer, on the host for experts that are not there."""
    ids = torch.tensor([[[0, 1], [2, 3]], [[0, outside], [2, 3]]]).to(dtype)
    with pytest.raises(ValueError, match=rf"expert id {outside} is outside \[0, 4\)"):
        ExpertLoad.of(ids, 4)
    assert ExpertLoad.of(ids[0], 4).counts_LE.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]  # of one row


def test_what_follows_from_the_counts():
    load = ExpertLoad(torch.tensor([[2, 2, 2, 2], [8, 0, 0, 0], [4, 4, 0, 0], [0, 0, 0, 0]]))
    assert load.max_over_mean.tolist()[:3] == [1.0, 4.0, 2.0] and math.isnan(load.max_over_mean[3])
    assert load.dead_experts.tolist() == [0, 3, 2, 4]
    assert load.entropy.tolist()[:3] == pytest.approx([1.0, 0.0, 0.5])
