"""What replay costs where arithmetic costs nothing: few tokens through many layers, so that only launches count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trl_r3._compat import set_checkpointing, swapped
from trl_r3.gating import native_kernels
from trl_r3.routers.router_replay import RouterReplay

from .setup import BenchSettings, Finding, large_model, random_ids, record_of

_TARGETS = {"intercept": 0.04, "op": 0.025}


def launches(settings: BenchSettings) -> list[Finding]:
    """Shares of a live forward and backward, in a model of many layers that sees few tokens."""
    sizes = replace(settings, hidden_size=64, num_layers=settings.launch_layers, batch=1, length=8)
    rounds = settings.launch_rounds
    findings = []
    for way in ("intercept", *(["op"] if "cpu" in native_kernels() else [])):
        # live is the same model with its handle idle: two copies of a model differ by more than replay costs
        model = large_model(sizes).train()
        ids = random_ids(model, sizes.batch, sizes.length)
        with RouterReplay(model, way) as replay:
            record = record_of(model, replay, ids)
            replays: dict[str, Callable[[], Any]] = {"replay": partial(replay.replay, record)}
            captures = {"capture": replay.record}
            whole = _beyond_live(partial(_step, model, ids), replays, rounds)
            forward = _beyond_live(partial(_step, model, ids, forward_only=True), captures, rounds)
            set_checkpointing(model, {"use_reentrant": False})
            steadied = {"steady": partial(swapped, replay, "steady_recompute", True)}
            parts = _beyond_live(partial(_step, model, ids), {**replays, **captures, **steadied}, rounds)
        live = whole["live"].step
        recompute = parts["replay"].backward / live
        findings += [
            Finding(f"launches, {way}: microseconds of a live step, a layer", live / sizes.num_layers * 1e6),
            Finding(f"launches, {way}: replay over a live step", whole["replay"].step / live, _TARGETS[way]),
            Finding(f"launches, {way}: recompute over a live step", recompute, 0.02),
            Finding(f"launches, {way}: capture over a forward", forward["capture"].step / forward["live"].step, 0.01),
        ]
        if way == "intercept":  # the op has no part in steady recomputes
            capture = parts["capture"].forward / live
            findings += [
                Finding("launches: capture of a training forward over a live step", capture),
                Finding(
                    "launches: steady recompute over a live step (target: capture and recompute)",
                    parts["steady"].step / live,
                    capture + recompute,
                ),
            ]
    return findings + seen_from_outside(settings)


def seen_from_outside(settings: BenchSettings) -> list[Finding]:
    """
    The shortest calls of a model that knows nothing of replay, and with it: checks of the record and all else inside.
    """
    sizes = replace(settings, hidden_size=32, num_layers=settings.launch_layers, num_experts=64, top_k=4)
    model = large_model(replace(sizes, batch=1, length=8)).train()
    ids = random_ids(model, 1, 8)
    with RouterReplay(model, "intercept") as replay:
        record = record_of(model, replay, ids)
    taken: dict[str, list[float]] = {}

    def note(name: str, context: Callable[[], Any], forward_only: bool) -> None:
        for _ in range(3):  # the first calls after attaching, and after removing, are slower
            taken.setdefault(name, []).append(_step(model, ids, context, forward_only).step)

    for _ in range(min(30, settings.launch_rounds)):
        for forward_only in (False, True):
            note(f"live {forward_only}", nullcontext, forward_only)
        with RouterReplay(model, "intercept") as replay:
            note("replay", partial(replay.replay, record), False)
            note("capture", replay.record, True)
    least = {name: min(seconds) for name, seconds in taken.items()}
    return [
        Finding(
            "launches seen from outside: replay over a live step", least["replay"] / least["live False"] - 1, 0.05
        ),
        Finding("launches seen from outside: capture over a forward", least["capture"] / least["live True"] - 1, 0.03),
    ]


class _Seconds(NamedTuple):
    """Processor seconds."""

    forward: float
    backward: float
    step: float


def _step(model: Any, ids: Tensor, context: Callable[[], Any], forward_only: bool = False) -> _Seconds:
    """Of a forward and backward, or of a forward that builds no graph."""
    begin = time.process_time()
    with torch.set_grad_enabled(not forward_only), context():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    between = time.process_time()
    if not forward_only:
        loss.backward()
    end = time.process_time()
    model.zero_grad()
    return _Seconds(between - begin, end - between, end - begin)


def _beyond_live(
    run: Callable[[Callable[[], Any]], _Seconds], contexts: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, _Seconds]:
    """
    What each context takes more than a live run of the same round, and `"live"` itself: medians over the rounds.

    Of each round, because a machine is faster in one minute than in another by more than replay costs.
    """
    taken: dict[str, list[_Seconds]] = {name: [] for name in ("live", *contexts)}
    for turn in range(rounds + 3):
        order = list(contexts)[:: 1 if turn % 2 else -1]
        before, after = run(nullcontext), {name: run(contexts[name]) for name in order}
        if turn < 3:  # the first ones warm up
            continue
        taken["live"].append(before)
        for name, seconds in after.items():
            taken[name].append(_Seconds(*(a - b for a, b in zip(seconds, before, strict=True))))
    return {name: _Seconds(*map(statistics.median, zip(*each, strict=True))) for name, each in taken.items()}
