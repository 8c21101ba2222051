"""One layer whose record is moved by one token, where neighbours have so much in common that it looks right."""

from itertools import product

import pytest
import torch
from alarm_settings import COLLAPSING, FAMILIES, half_collapsed
from misrouted import Bench, engine_of, record_of
from model_zoo import build_tiny

from trl_r3.alarm.judge import Fault, Judge

SAMPLES, TOKENS = 8, 132


def repeating(share, seed=1):
    """Tokens that repeat the one before them in this share of the places, as code and tables do."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 120, (SAMPLES, TOKENS), generator=generator)
    repeats = torch.rand(SAMPLES, TOKENS, generator=generator) < share
    for token in range(1, TOKENS):
        ids[:, token] = torch.where(repeats[:, token], ids[:, token - 1], ids[:, token])
    return ids


def moved(record, layer, by):
    wrong = record.clone()
    wrong[:, :, layer] = record.roll(by, 1)[:, :, layer]
    return wrong


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_it_is_named(family, share, precision, monkeypatch):
    ids = repeating(share)
    model = build_tiny(family, initializer_range=0.1, **FAMILIES[family])
    bench, record = Bench(model, ids), record_of(engine_of(model, precision), ids)
    assert bench.verdict(record).fault is None
    layers = bench.observe(record)[0].moe_layers
    for (index, layer), (by, side) in product(enumerate(layers), ((1, "later"), (-1, "earlier"))):
        found = bench.verdict(moved(record, index, by)).found
        assert found is not None and found.kind is Fault.MOVED, (layer, side)
        assert "layer" in found.fact and f"one {side}" in found.fact
    assert found.fact.startswith(f"layer {layers[-1]} is moved")
    monkeypatch.setattr(Judge, "_moved_layer", lambda self: None)  # contrast over all layers hides it
    assert bench.verdict(moved(record, len(layers) - 1, 1)).fault is None


@pytest.mark.parametrize(("family", "experts", "top_k"), COLLAPSING)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("own", [0.2, 0.5])
def test_a_right_record_of_half_collapsed_routers_is_none(family, experts, top_k, own, share):
    ids = repeating(share, seed=3)
    model = half_collapsed(family, experts, top_k, own, seed=3)
    for precision in ("bf16", "fp8"):
        assert Bench(model, ids).verdict(record_of(engine_of(model, precision), ids)).fault is None
