"""Start scripts in two processes, as users do."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trl_r3

ROOT = Path(trl_r3.__file__).parents[1]
CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"
HERE = Path(__file__).parent

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


def accelerate_launch(settings: list, script: list, processes: int = 2) -> list:
    """The command for [`start`]."""
    launcher = ["accelerate.commands.accelerate_cli", "launch", *settings, "--num_processes", processes]
    return [*launcher, "--mixed_precision", "no", "--main_process_port", 0, *script]
