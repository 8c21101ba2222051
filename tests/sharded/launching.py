"""Start scripts in two processes, as users do: one launch for all cases that share it, once in a session of tests."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import trl_r3

ROOT = Path(trl_r3.__file__).parents[1]
CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"
SCRIPT = Path(__file__).with_name("run_cases.py")
KINDS = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}  # what Accelerate makes of a config on a CPU
TRAIN = "sharded.train_sharded"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", 2]

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: `pip install deepspeed` builds it, with PyTorch and a compiler at hand",
)


def accelerate_launch(settings: list, processes: int = 2) -> list:
    """The module and its arguments, before a script."""
    launcher = ["accelerate.commands.accelerate_cli", "launch", *settings, "--num_processes", processes]
    return [*launcher, "--mixed_precision", "no", "--main_process_port", 0]


def of_config(name: str, processes: int = 2) -> list:
    """With a config that users are given."""
    return accelerate_launch(["--config_file", CONFIGS / f"{name}.yaml"], processes)


@dataclass(frozen=True)
class Case:
    """What the processes of a launch run: a module in `tests`, and its options."""

    name: str
    module: str
    options: list


@dataclass(frozen=True)
class Launch:
    """A launcher, before its script, and the cases that its processes run."""

    launcher: list
    cases: list[Case]
    processes: int = 2

    def run(self, folder: Path) -> None:
        """Leave in a folder what each rank reports and prints of each case, and what the launcher prints."""
        listed = folder / f"{self.cases[0].name}-cases.json"
        listed.write_text(json.dumps([[case.name, case.module, [*map(str, case.options)]] for case in self.cases]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        with self._log(folder).open("w") as log:
            subprocess.run(
                [sys.executable, "-m", *map(str, self.launcher), SCRIPT, listed],
                cwd=folder, env=environment, stdout=log, stderr=log, timeout=300 * (1 + len(self.cases)),
            )  # fmt: skip

    def reports(self, folder: Path, name: str) -> list[dict]:
        """What each rank reports of a case; a case that failed fails its test."""
        paths = [folder / f"{name}-rank{rank}.json" for rank in range(self.processes)]
        if not all(path.exists() for path in paths):
            logs = [self._log(folder), *sorted(folder.glob(f"{name}-rank*.log"))]
            pytest.fail("\n".join(f"{log.name}:\n{log.read_text()[-12000:]}" for log in logs), pytrace=False)
        return [json.loads(path.read_text()) for path in paths]

    def _log(self, folder: Path) -> Path:
        return folder / f"{self.cases[0].name}-launcher.log"


class Results:
    """Reports of cases by their names, of launches that are made when the first of their cases is asked for."""

    def __init__(self, folder: Path, launches: dict[str, Launch]) -> None:
        self.folder, self.launches = folder, launches

    def __call__(self, name: str) -> list[dict]:
        """What each rank reports."""
        (key,) = [key for key, launch in self.launches.items() if name in {case.name for case in launch.cases}]
        with once(self.folder / f"{key}.launched") as first:
            if first:
                with locked(self.folder / "launching.lock"):  # processes that wait for each other want the cores
                    self.launches[key].run(self.folder)
        return self.launches[key].reports(self.folder, name)


def shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder that all workers of pytest-xdist see, each of which has a temporary folder in that of the session."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def once(done: Path) -> Iterator[bool]:
    """Whether the block has to do what makes `done`: the first worker does, others wait for it."""
    with locked(done.with_suffix(".lock")):
        yield not done.exists()
        done.touch()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One worker at a time."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
