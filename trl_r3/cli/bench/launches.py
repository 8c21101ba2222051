"""What replay costs where arithmetic costs nothing: few tokens through many layers, so that only launches count."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...gating import native_kernels
from ...routers.router_replay import RouterReplay
from .fidelity import enable_checkpointing
from .setup import BenchSettings, Finding, large_model, random_ids, record_of

_LIVE = "live"


def launches(settings: BenchSettings) -> list[Finding]:
    """Shares of a live forward and backward, in a model of many layers that sees few tokens."""
    sizes = replace(settings, hidden_size=64, num_layers=settings.launch_layers, batch=1, length=8)
    model = large_model(sizes).train()
    ids = random_ids(model, sizes.batch, sizes.length)
    ways = ["intercept", *(["op"] if "cpu" in native_kernels() else [])]
    models = {_LIVE: model, **{way: copy.deepcopy(model) for way in ways}}
    handles = {way: RouterReplay(models[way], way) for way in ways}
    record = record_of(models["intercept"], handles["intercept"], ids)

    def replaying(way: str) -> Callable[[], Any]:
        return (lambda: handles[way].replay(record)) if way in handles else nullcontext

    steps = {way: _step(models[way], ids, replaying(way)) for way in models}
    step = _medians(steps, settings.launch_rounds)
    for each in models.values():
        enable_checkpointing(each, {"use_reentrant": False})
    backwards = {way: _step(models[way], ids, replaying(way), True) for way in models}
    backward = _medians(backwards, settings.launch_rounds)
    forward = _medians(
        {
            _LIVE: _forward(model, ids, nullcontext),
            "capture": _forward(models["intercept"], ids, handles["intercept"].record),
        },
        settings.launch_rounds,
    )
    live = step[_LIVE]
    findings = [
        Finding("launches: microseconds of a live forward and backward, a layer", live / sizes.num_layers * 1e6)
    ]
    for way in ways:
        target = {"intercept": 0.04, "op": 0.025}[way]
        findings.append(Finding(f"launches: replay by {way}, over a live step", step[way] / live - 1, target))
        findings.append(
            Finding(f"launches: recompute by {way}, over a live step", (backward[way] - backward[_LIVE]) / live, 0.02)
        )
    findings.append(
        Finding(
            "launches: capture, over a live forward without gradients", forward["capture"] / forward[_LIVE] - 1, 0.01
        )
    )
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
