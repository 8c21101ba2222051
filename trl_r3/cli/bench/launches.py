"""What replay costs where arithmetic costs nothing: few tokens through many layers, so that only launches count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._compat import set_checkpointing, swapped
from ...gating import native_kernels
from ...routers.router_replay import RouterReplay
from .setup import BenchSettings, Finding, large_model, random_ids, record_of

_TARGETS = {"intercept": 0.04, "op": 0.025}


def launches(settings: BenchSettings) -> list[Finding]:
    """Shares of a live forward and backward, in a model of many layers that sees few tokens."""
    sizes = replace(settings, hidden_size=64, num_layers=settings.launch_layers, batch=1, length=8)
    findings = []
    for way in ("intercept", *(["op"] if "cpu" in native_kernels() else [])):
        # live is the same model with its handle idle: two copies of a model differ by more than replay costs
        model = large_model(sizes).train()
        ids = random_ids(model, sizes.batch, sizes.length)
        with RouterReplay(model, way) as replay:
            record = record_of(model, replay, ids)
            contexts: dict[str, Callable[[], Any]] = {"live": nullcontext, "replay": partial(replay.replay, record)}
            step = _medians({k: _step(model, ids, each) for k, each in contexts.items()}, settings.launch_rounds)
            forwards = {"live": _forward(model, ids, nullcontext), "capture": _forward(model, ids, replay.record)}
            forward = _medians(forwards, settings.launch_rounds)
            set_checkpointing(model, {"use_reentrant": False})
            back = _medians({k: _step(model, ids, each, True) for k, each in contexts.items()}, settings.launch_rounds)
            contexts = {"live": nullcontext, "steady": partial(swapped, replay, "steady_recompute", True)}
            whole = _medians({k: _step(model, ids, each) for k, each in contexts.items()}, settings.launch_rounds)
        live, target = step["live"], _TARGETS[way]
        findings += [
            Finding(f"launches, {way}: microseconds of a live step, a layer", live / sizes.num_layers * 1e6),
            Finding(f"launches, {way}: replay over a live step", step["replay"] / live - 1, target),
            Finding(f"launches, {way}: recompute over a live step", (back["replay"] - back["live"]) / live, 0.02),
            Finding(f"launches, {way}: capture over a forward", forward["capture"] / forward["live"] - 1, 0.01),
            Finding(
                f"launches, {way}: steady recompute over a live step", (whole["steady"] - whole["live"]) / live, 0.03
            ),
        ]
    return findings


def _step(model: Any, ids: Tensor, context: Callable[[], Any], backward_only: bool = False) -> Callable[[], float]:
    """Processor seconds of a forward and backward, or of the backward alone."""

    def run() -> float:
        begin = time.process_time()
        with context():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if backward_only:
            begin = time.process_time()
        loss.backward()
        seconds = time.process_time() - begin
        model.zero_grad()
        return seconds

    return run


def _forward(model: Any, ids: Tensor, context: Callable[[], Any]) -> Callable[[], float]:
    """Processor seconds of a forward without gradients."""

    def run() -> float:
        begin = time.process_time()
        with torch.no_grad(), context():
            model(input_ids=ids, use_cache=False)
        return time.process_time() - begin

    return run


def _medians(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of each over so many rounds, in which every run has its turn and none always follows the same other."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds + 3):
        for name in names if turn % 2 else reversed(names):
            taken = runs[name]()
            if turn >= 3:  # the first ones warm up
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}
