"""The benchmark of padding runs, and its batches have the share of padding that it says."""

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import padding, unpadded
from benchmarks.setup import BenchSettings


@pytest.mark.parametrize("share", padding.TARGETS)
def test_batches_have_so_much_padding(share):
    mask = unpadded.mask_of(8, 256, share)
    assert 1 - mask.float().mean().item() == pytest.approx(share, abs=0.03)
    assert mask.any(1).all() and (not share or len(set(mask.sum(1).tolist())) > 4)


def test_every_arm_is_measured(capsys, monkeypatch):
    own = padding.run
    found: list = []
    monkeypatch.setattr(padding, "run", lambda *args, **kwargs: found.extend(own(*args, **kwargs)) or found)
    assert command.main(["padding", "--smoke"]) == 0
    targets = {line.what.partition(":")[0]: line.target for line in found if line.target}
    assert [*targets.values()] == [1.02, 0.8, 0.6, 0.6, 0.45, 0.75, 0.8, 0.75, 0.6, 0.65, 0.65, 1.05]
    assert len(found) == 30 and all(line.value > 0 for line in found if "resident" not in line.what)
    text, progress = capsys.readouterr()
    assert progress.count(" of 10: ") == 10 and "8 of 10: GRPO step" in progress
    assert "GRPO step, 35% padding: replayed without over live" in text
    assert "in micro-batches of 1, 4" in text and "eager attention, 4" in text and "prefill, " in text


def test_memory_and_bits_are_of_another_kind(monkeypatch):
    """What is kept without padding is about the share of real tokens; a wrong gradient is far from the exact one."""
    small = BenchSettings(hidden_size=64, num_layers=2, num_experts=8, top_k=2, batch=8, length=64)
    kept = {arm: unpadded.kept_bytes(small, arm) for arm in unpadded.ARMS}
    assert kept["auto"] < 0.7 * kept["live"] and kept["keep"] == pytest.approx(kept["live"], rel=0.05)
    monkeypatch.setattr(
        unpadded,
        "gradients_of",
        lambda settings, arm, dtype, own=unpadded.gradients_of: {
            name: each * (2 if (arm, dtype) == ("auto", torch.bfloat16) else 1)
            for name, each in own(settings, arm, dtype).items()
        },
    )
    assert unpadded.unpadded_bits(small)[1].met is False
