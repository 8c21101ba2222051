"""The benchmark runs to its end without a GPU, and checks before it measures."""

import pytest
import torch

from benchmarks import gating as bench


def test_a_smoke_run_measures_every_shape(capsys):
    assert bench.run(smoke=True, device="cpu") == 0
    out = capsys.readouterr().out
    assert "SMOKE: times mean nothing" in out
    assert out.count("| T=256 ") == 6 * len(bench.SHAPES)
    assert "host time of one call" in out


def test_without_a_gpu_it_says_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.run() == 2
    assert "finds none. Use --smoke, or --device cpu." in capsys.readouterr().out


def test_wrong_numbers_are_not_measured(monkeypatch):
    right = bench.op_forward

    def wrong(*arguments):
        weights, ids, status = right(*arguments)
        return weights * 1.1, ids, status

    monkeypatch.setattr(bench, "op_forward", wrong)
    with pytest.raises(AssertionError):
        bench.run(smoke=True, device="cpu")


def test_necessary_bytes_are_those_of_the_floor():
    headline = bench.SHAPES[0]
    megabytes = {name: bench.necessary_bytes(headline, name) / 1e6 for name in ("live", "replay", "backward")}
    assert {name: round(number, 1) for name, number in megabytes.items()} == {
        "live": 22.0,
        "replay": 23.1,
        "backward": 23.1,
    }
    assert bench.necessary_bytes(headline, "backward, dense") / 1e6 == pytest.approx(38.8, abs=0.05)
