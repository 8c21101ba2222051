"""What skipping padding leaves of an update: its memory, and how far its gradients are from exact ones.

Legend: B batch, T tokens of a padded sequence.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl_r3.routers.router_replay import RouterReplay

from .setup import BenchSettings, Finding, large_model, random_ids, record_of

ARMS = ("live", "keep", "auto")


def mask_of(batch: int, length: int, share: float) -> Tensor:
    """(B, T): completions of lengths from long to short, with so much padding in all; prompts differ a little."""
    if not share:
        return torch.ones(batch, length, dtype=torch.int64)
    mean = 1 - share
    ends = torch.linspace(min(1.0, 2 * mean), max(0.02, 2 * mean - 1), batch) * length
    starts = torch.arange(batch) % 4
    places = torch.arange(length)[None]
    return ((places >= starts[:, None]) & (places < ends[:, None].round().clamp(min=8))).long()


def prepared(
    settings: BenchSettings, arm: str, dtype: torch.dtype = torch.float32
) -> tuple[Any, Callable[[], Tensor]]:
    """A model, and a forward of an arm over a batch of which half is padding, to its loss."""
    model = large_model(settings).train()
    ids, mask = random_ids(model, settings.batch, settings.length), mask_of(settings.batch, settings.length, 0.5)
    labels = ids.masked_fill((mask & mask.roll(1, 1)) == 0, -100)
    with RouterReplay(model) as replay:
        record = record_of(model, replay, ids)
    model.to(dtype)
    handle = None if arm == "live" else RouterReplay(model, padding=arm)

    def forward() -> Tensor:
        with handle.replay(record) if handle else nullcontext():
            return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss

    return model, forward


def kept_bytes(settings: BenchSettings, arm: str) -> int:
    """What a forward keeps for its backward, beside weights."""
    model, forward = prepared(settings, arm)
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    for weight in model.parameters():
        seen.pop(weight.untyped_storage().data_ptr(), None)
    del loss  # until here what was seen was alive, so that no address stands for two
    return sum(seen.values())


def peak_bytes(settings: BenchSettings, arm: str) -> int:
    """How far the resident memory of this process rises in an update whose gradients have their memory."""
    torch.set_num_threads(1)
    model, forward = prepared(settings, arm)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    gc.collect()
    before = memory_of_process("VmRSS")
    forward().backward()
    return memory_of_process("VmHWM") - before


def memory_of_process(name: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def in_processes(settings: BenchSettings) -> dict[str, int]:
    """[`peak_bytes`] of each arm, each in a process of its own."""
    found = {}
    for arm in ARMS:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found[arm] = pool.submit(peak_bytes, settings, arm).result()
    return found


def unpadded_memory(settings: BenchSettings) -> list[Finding]:
    """Of an update over a batch of which half is padding, over that of a live one."""
    ways = {"kept for backward": {arm: kept_bytes(settings, arm) for arm in ARMS}, "resident": in_processes(settings)}
    return [
        Finding(
            f"memory of an update, {way}, 50% padding: replayed {how} over live", found[arm] / found["live"], target
        )
        for way, found in ways.items()
        for arm, how, target in (("keep", "with padding", None), ("auto", "without", 0.65))
    ]


def gradients_of(settings: BenchSettings, arm: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the loss."""
    model, forward = prepared(settings, arm, dtype)
    forward().backward()
    return {name: weight.grad.double() for name, weight in model.named_parameters() if weight.grad is not None}


def unpadded_bits(settings: BenchSettings) -> list[Finding]:
    """How far gradients in bfloat16 are from those in float32, each over its norm: the median over the weights."""
    exact = gradients_of(settings, "keep", torch.float32)
    distance = {}
    for arm in ("keep", "auto"):
        found = gradients_of(settings, arm, torch.bfloat16)
        distance[arm] = statistics.median(
            ((found[name] - each).norm() / each.norm()).item() for name, each in exact.items() if each.norm() > 0
        )
    return [
        Finding("gradients in bfloat16 from float32, with padding", distance["keep"]),
        Finding("gradients in bfloat16 from float32, without over with", distance["auto"] / distance["keep"], 1.05),
    ]
