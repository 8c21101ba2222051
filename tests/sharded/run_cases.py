"""
Cases that share the imports of one launch, one after the other: `run_cases.py LIST`, for a launcher.

The list is a file of JSON with the name, the module and the options of each. A rank forks a process for a case once
all modules are imported, so a case finds what a launch gives it and leaves nothing to the next. What the module's
`run(folder, name, options)` returns is written to `NAME-rankN.json` beside the list, and what it prints to
`NAME-rankN.log`. Where the process of one rank fails, those of the others are ended.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "vllm_cpu"))

import torch
import transformers
from torch.distributed import TCPStore

LONGEST = 300  # seconds of a case
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
HOST = "127.0.0.1"


def serve() -> TCPStore:
    return TCPStore(HOST, 0, is_master=True, wait_for_workers=False)


def connected(address: str, port: str) -> TCPStore:
    return TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=2 * LONGEST))


def of_launcher() -> TCPStore:
    """The store of all ranks, which outlives process groups; a launcher of one process has none."""
    if RANKS == 1:
        return serve()
    assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    return connected(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])


def meet(store: TCPStore, name: str, text: str = "") -> str:
    """Wait for all ranks; what the first one says."""
    store.set(f"{name}/{RANK}", text)
    first, *_ = [store.get(f"{name}/{rank}") for rank in range(RANKS)]
    return first.decode()


def share(modules: set[str]) -> None:
    """Let the cases find done what each of them would do again."""
    for module in modules:
        importlib.import_module(module)
    if importlib.util.find_spec("deepspeed") is not None:  # Accelerate imports it where it is installed
        from deepspeed import ops

        # it would first compile a reduce of its own for CPUs, for a minute in a fresh environment
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Accelerate reads two a dozen times a run, and for each weight that is sent
    importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
    gc.collect()
    gc.freeze()  # it collects at the end of a run, over two million objects of libraries


def run_case(folder: Path, name: str, module: str, options: list[str], port: str) -> None:
    """All that the process of a case does, with a store of its own at the port."""
    log = os.open(folder / f"{name}-rank{RANK}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    failed = 1
    try:
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        if RANKS > 1:
            os.environ.update(MASTER_ADDR=HOST, MASTER_PORT=port)
        torch.set_num_threads(1)
        transformers.set_seed(0)
        report = importlib.import_module(module).run(folder, name, options)
        # one process may not find the group of another gone while it saves
        meet(connected(HOST, port), "case/ended")
        (folder / f"{name}-rank{RANK}.json").write_text(json.dumps(report))
        failed = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failed)  # exit handlers aborted in 1 run of 55: PyTorch 2.13 leaves threads to them


def watch_case(process: int, store: TCPStore, failure: str) -> None:
    """Wait for the process of a case, and end it where that of another rank fails."""
    ended = 0
    while not ended:
        time.sleep(0.02)
        ended, status = os.waitpid(process, os.WNOHANG)
        if not ended and store.check([failure]):
            os.kill(process, signal.SIGKILL)
    if status != 0:
        store.set(failure, str(RANK))


def main(listed: Path) -> None:
    store = of_launcher()
    cases = json.loads(listed.read_text())
    share({module for _, module, _ in cases})
    kept = []
    for index, (name, module, options) in enumerate(cases):
        # a store for each: keys of a process group that has ended would still be in it
        if RANK == 0:
            kept.append(serve())
        port = meet(store, f"{index}/port", str(kept[-1].port) if RANK == 0 else "")
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if process == 0:
            run_case(listed.parent, name, module, options, port)
        watch_case(process, store, f"{index}/failed")
        meet(store, f"{index}/over")
    os._exit(0)  # as that of a case


if __name__ == "__main__":
    main(Path(sys.argv[1]))
