"""The benchmark of padding runs, and its batches have the share of padding that it says."""

import pytest

from benchmarks import padding
from benchmarks.setup import BenchSettings


@pytest.mark.parametrize("share", padding.TARGETS)
def test_batches_have_so_much_padding(share):
    mask = padding.mask_of(8, 256, share)
    assert 1 - mask.float().mean().item() == pytest.approx(share, abs=0.03)
    assert mask.any(1).all() and len(set(mask.sum(1).tolist())) > 4


def test_every_arm_is_measured(capsys):
    small = BenchSettings(hidden_size=32, num_layers=2, num_experts=8, top_k=2, batch=4, length=32)
    found = padding.run(small, rounds=1)
    assert [line.target for line in found if line.target] == [0.8, 0.6, 0.6, 0.45, 0.6]
    assert len(found) == 14 and all(line.value > 0 for line in found)
    assert "GRPO step, 35% padding: replayed without over live" in capsys.readouterr().out
