"""Start scripts in two processes, as users do."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import trl_r3

ROOT = Path(trl_r3.__file__).parents[1]
CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"
HERE = Path(__file__).parent
KINDS = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}  # what Accelerate makes of a config on a CPU

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: `pip install deepspeed` builds it, with PyTorch and a compiler at hand",
)


def start(command: list, folder: Path) -> subprocess.CompletedProcess:
    """A module of Python and its arguments, in a folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def run(command: list, folder: Path) -> str:
    """What it wrote to stderr; it has to succeed."""
    done = start(command, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stderr


def launch(folder: Path, config: str, name: str, *options: Any, processes: int = 2) -> list[dict]:
    """What each rank reports of a run of `train_sharded.py`."""
    script = [HERE / "train_sharded.py", folder, "--name", name, "--batch", 8 // processes, *options]
    run(accelerate_launch(["--config_file", CONFIGS / f"{config}.yaml"], script, processes), folder)
    return [json.loads((folder / f"{name}-rank{rank}.json").read_text()) for rank in range(processes)]


def accelerate_launch(settings: list, script: list, processes: int = 2) -> list:
    """The command for [`start`]."""
    launcher = ["accelerate.commands.accelerate_cli", "launch", *settings, "--num_processes", processes]
    return [*launcher, "--mixed_precision", "no", "--main_process_port", 0, *script]
