"""
Cases that share the processes of one launch, one after the other: `run_cases.py LIST`, for a launcher.

The list is a file of JSON with the name, the module and the options of each. What the module's `run(folder, name,
options)` returns is written to `NAME-rankN.json` beside the list. Every case begins as a process does: with the
environment and the seeds of the launch, a process group of its own, and nothing that libraries keep of the cases
before. One that raises or hangs ends the launch, as other ranks may wait for it, and `launching.py` launches those
after it again.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import sys
import traceback
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "vllm_cpu"))

import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, GradientState
from torch.distributed import TCPStore
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

LONGEST = 300  # seconds of a case
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LINEAR = torch.nn.functional.linear
CACHE = type(lru_cache(len))
CACHES: list = []  # of DeepSpeed


def end_deepspeed() -> None:
    """What it holds in globals of its own: process groups, an operation, and models, in a stack and in caches."""
    if "deepspeed" not in sys.modules:
        return
    import deepspeed

    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
        deepspeed.comm.comm.cdb = None
    torch.nn.functional.linear = LINEAR  # `deepspeed.zero.Init` replaces it for good
    deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK.clear()
    caches = (each for each in gc.get_objects() if type(each) is CACHE)
    CACHES.extend(each for each in caches if each.__module__.startswith("deepspeed."))
    for cache in CACHES:
        cache.cache_clear()


def living_models() -> list[str]:
    return [type(each).__name__ for each in gc.get_objects() if issubclass(type(each), transformers.PreTrainedModel)]


class Ranks:
    """All processes of a launch, by the store of their launcher: it outlives the process groups of cases."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self.waits = 0
        self.rendezvous: list[TCPStore] = []  # of the process groups but the first, where the first rank makes them
        if RANKS > 1:
            assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self.store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=2 * LONGEST))

    def told(self, text: str = "") -> str:
        """Wait for all; what the first one says."""
        if RANKS == 1:
            return text
        self.waits += 1
        self.store.set(f"cases/{self.waits}/{RANK}", text)
        first, *_ = [self.store.get(f"cases/{self.waits}/{rank}") for rank in range(RANKS)]
        return first.decode()

    def forget(self) -> None:
        """Undo what a case leaves to a process: the next one is not to know of it."""
        end_deepspeed()
        if dist.is_initialized():
            dist.destroy_process_group()
        GradientState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)
        unset_hf_deepspeed_config()
        os.environ.clear()
        os.environ.update(self.environment)
        gc.collect()
        assert not living_models(), f"{living_models()} outlive their case"
        gc.freeze()  # what is left stays, and is not searched again
        assert torch.get_default_dtype() is torch.float32 and not is_deepspeed_zero3_enabled()
        if RANKS > 1:  # keys of a process group that has ended are still in its store
            if RANK == 0:
                self.rendezvous.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
            port = self.told(str(self.rendezvous[-1].port) if RANK == 0 else "")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def main(listed: Path) -> None:
    ranks, folder = Ranks(), listed.parent
    cases = json.loads(listed.read_text())
    for index, (name, module, options) in enumerate(cases):
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        torch.set_num_threads(1)
        transformers.set_seed(0)
        report = importlib.import_module(module).run(folder, name, options)
        ranks.told()  # or one process may find the group of the other gone while it saves
        if index + 1 < len(cases):
            ranks.forget()
        ranks.told()  # a case is over when it is on all ranks
        (folder / f"{name}-rank{RANK}.json").write_text(json.dumps(report))
    ranks.told()
    os._exit(0)  # exit handlers aborted in 1 run of 55: PyTorch 2.13 leaves threads to them


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # other ranks may wait for this one, whose launcher ends them
