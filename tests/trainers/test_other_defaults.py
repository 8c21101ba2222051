"""`torch.set_default_device` and `torch.set_default_dtype` change nothing of what is recorded, replayed and logged."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from trainers.test_grpo import assert_replayed

import trl_r3

PACKAGE = Path(trl_r3.__file__).parent
MAKES = ("tensor", "as_tensor", "zeros", "ones", "full", "empty", "arange", "linspace", "rand", "randn", "randint")
LOGGED = ("sampling/k3_kl", "sampling/live/k3_kl", "routing_replay/agreement", "routing_replay/contrast")


class Elsewhere(TorchFunctionMode):
    """A default device for the package alone, as others choose "cuda"; what is made there has no data."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        is_ours = sys._getframe(1).f_code.co_filename.startswith(str(PACKAGE))
        if is_ours and func in [getattr(torch, name) for name in MAKES] and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@pytest.mark.parametrize("mode", ["R3", "R2"])
def test_another_default_device(qwen3, build, check, gap, tmp_path, mode):
    settings = {"routing_replay_compare_every": 1, "routing_replay_load_every": 1, "num_iterations": 2, "max_steps": 3}
    settings |= {"routing_replay_trace_dir": str(tmp_path / "traces"), "use_sampling_mask_replay": True, "top_p": 0.9}
    trainer = build(qwen3(), while_generating=gap["scrambled"], routing_replay_mode=mode, **settings)
    with Elsewhere():
        trainer.train()
    assert_replayed(trainer, check, mode)


def test_what_is_made_names_its_device():
    unnamed, makes = [], [f"torch.{name}" for name in MAKES]
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / "cli"):  # a process of its own
            continue
        calls = [each for each in ast.walk(ast.parse(path.read_text())) if isinstance(each, ast.Call)]
        made = [call for call in calls if ast.unparse(call.func) in makes]
        unnamed += [f"{path}:{call.lineno}" for call in made if "device" not in [each.arg for each in call.keywords]]
    assert not unnamed


@pytest.mark.parametrize("changes", [{}, {"use_sampling_mask_replay": True, "top_p": 0.9}], ids=["routes", "masks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype(qwen3, train, check, gap, dtype, changes):
    """TRL's advantages are rounded to it, but not what the first rollout says."""
    changes |= {"generation_kwargs": {"suppress_tokens": [0]}, "routing_replay_compare_every": 1, "max_steps": 1}
    changes |= {"while_generating": gap["rounded"]}
    expected = train(qwen3(), **changes)
    model = qwen3()
    torch.set_default_dtype(dtype)
    try:
        trainer = train(model, **changes)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_replayed(trainer, check, "R3")
    logs = [each.state.log_history[0] for each in (trainer, expected)]
    assert [logs[0][name] for name in LOGGED] == [logs[1][name] for name in LOGGED]
