"""What replay and capture cost: paired measurements, the ratio of the medians of processor time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from trl_r3.engines.generate import generate_with_routes
from trl_r3.records.record import pack
from trl_r3.routers.router_replay import RouterReplay

from .setup import BenchSettings, Finding, large_model, random_ids, record_of


def paired(prepare: Callable[[bool], Any], pairs: int) -> tuple[float, float]:
    """
    Time something without and with replay, by turns.

    Args:
        prepare (`Callable`):
            Given whether replay is on, a context manager around a function without arguments, which is timed.
        pairs (`int`):
            How often each is timed.

    Returns:
        `tuple[float, float]`: Median processor seconds, without and with.
    """
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(pairs + 1):
        for with_replay in (False, True) if pair % 2 else (True, False):  # neither always follows the other
            with prepare(with_replay) as run:
                begin = time.process_time()
                run()
                if pair:  # the first pair warms up
                    seconds[with_replay].append(time.process_time() - begin)
    return statistics.median(seconds[False]), statistics.median(seconds[True])


def cost(what: str, target: float, without: float, with_replay: float) -> list[Finding]:
    """The lines of one comparison."""
    return [
        Finding(f"{what}: with over without", with_replay / without, target),
        Finding(f"{what}: seconds without", without),
        Finding(f"{what}: seconds with", with_replay),
    ]


def training_cost(settings: BenchSettings) -> list[Finding]:
    """Forward, backward and update of AdamW, with a record and without."""
    model = large_model(settings).train()
    ids = random_ids(model, settings.batch, settings.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    with RouterReplay(model) as replay:
        record = record_of(model, replay, ids)

    @contextmanager
    def prepare(with_replay: bool) -> Iterator[Callable[[], None]]:
        with ExitStack() as stack:
            handle = stack.enter_context(RouterReplay(model)) if with_replay else None

            def step() -> None:
                with handle.replay(record) if handle else nullcontext():
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            yield step

    return cost("training step", 1.02, *paired(prepare, settings.pairs))


def generation_cost(settings: BenchSettings) -> list[Finding]:
    """Sampling, with routes and log-probabilities captured and without."""
    model = large_model(settings).eval()
    ids = random_ids(model, settings.prompts, settings.prompt_length)
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": True}
    kwargs["max_new_tokens"] = kwargs["min_new_tokens"] = settings.new_tokens

    @contextmanager
    def prepare(with_replay: bool) -> Iterator[Callable[[], Any]]:
        torch.manual_seed(0)
        with ExitStack() as stack:
            if with_replay:
                replay = stack.enter_context(RouterReplay(model))
                yield lambda: generate_with_routes(model, replay, model.generate, (), kwargs, temperature=1.0)
            else:
                yield lambda: model.generate(**kwargs)

    return cost("generation", 1.03, *paired(prepare, settings.pairs))


def storage(settings: BenchSettings) -> list[Finding]:
    """Bytes of a record in host memory."""
    model = large_model(settings)
    ids = random_ids(model, settings.batch, settings.length)
    with RouterReplay(model) as replay:
        packed = pack(record_of(model, replay, ids), replay.layout)
        per_router = packed.numel() * packed.itemsize / ids.numel() / len(replay.moe_layers)
    return [Finding("stored bytes a token and MoE layer", per_router, settings.top_k)]
