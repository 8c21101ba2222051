"""Train a small mixture of experts from the same weights, live and with replay, where rollouts route with noise."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PrinterCallback
from transformers.utils.logging import disable_progress_bar

from ...trainers.grpo import R3GRPOConfig
from ..twin import one_thread
from .low_precision import LowPrecisionRolloutTrainer
from .noise import noisy_selection
from .run import StepClock
from .settings import of_small_runs
from .sorting import all_right, draw_batch, make_rows, share_sorted, sorting_config, sorting_tokenizer

START = Path(__file__).parent / "sorting_start.safetensors"
LIVE, REPLAY = "live routing", "replay"
LENGTH = 10


@dataclass(frozen=True)
class NoisySettings:
    """
    Sizes of a demo.

    Args:
        steps (`int`):
            GRPO updates of each run, one a rollout.
        seeds (`int`):
            Runs with and without replay, each pair with prompts, samples and noise of its own.
        prompts, generations (`int`):
            Rows in a rollout, and completions of each.
        learning_rate (`float`):
            Of GRPO.
        noise (`float`):
            Noise on the router logits of the rollout, in standard deviations of them.
        measure_every (`int`):
            Every so many steps the mismatch is measured.
        held_out (`int`):
            Rows that are sorted greedily before and after.
    """

    steps: int = 260
    seeds: int = 2
    prompts: int = 16
    generations: int = 8
    learning_rate: float = 5e-4
    noise: float = 0.7
    measure_every: int = 20
    held_out: int = 500


SMOKE = NoisySettings(steps=6, seeds=1, prompts=4, generations=4, measure_every=2, held_out=50)


@dataclass
class NoisyRun:
    """One GRPO run."""

    sorted_before: float
    sorted_after: float
    measured: list[dict[str, float]]  # a dict a measured step
    log: list[dict[str, float]]  # what TRL logged, a dict a step
    seconds_per_step: float  # of the processor, median of the steps that were not measured


@dataclass
class NoisyResult:
    """What a demo leaves: for each way, a run a seed."""

    parameters: int
    seconds: float = 0.0
    runs: dict[str, list[NoisyRun]] = field(default_factory=dict)


class NoisyRolloutTrainer(LowPrecisionRolloutTrainer):
    """
    [`LowPrecisionRolloutTrainer`] whose rollouts select experts with noise, and compute as training does.

    Args:
        noise (`float`):
            Standard deviation of the noise, in units of that of a token's router logits.
        kwargs:
            All other arguments are those of [`LowPrecisionRolloutTrainer`].
    """

    def __init__(self, *args, noise: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.noise = noise
        self.draws = torch.Generator().manual_seed(self.args.seed)

    def _rollout_numerics(self, model: Any) -> AbstractContextManager[None]:
        return noisy_selection(model, self.noise, self.draws)


def load_start() -> Any:
    """The warmed-up model that comes with the package."""
    model = AutoModelForCausalLM.from_config(sorting_config())
    model.load_state_dict({name: weights.float() for name, weights in load_file(START).items()})
    return model


def run_noisy_demo(settings: NoisySettings, output: Path, console: Any) -> NoisyResult:
    """
    Run the demo: both ways beside each other where there are two cores.

    Args:
        settings ([`NoisySettings`]):
            Sizes.
        output (`Path`):
            Folder; the model is saved to `start` in it, traces of a run with replay to `traces`.
        console (`rich.console.Console`):
            Where progress is shown.

    Returns:
        [`NoisyResult`].
    """
    begin = time.perf_counter()
    model = load_start()
    model.save_pretrained(output / "start")
    sorting_tokenizer().save_pretrained(output / "start")
    result = NoisyResult(sum(parameter.numel() for parameter in model.parameters()))
    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks = {way: progress.add_task(way, total=settings.steps * settings.seeds) for way in (LIVE, REPLAY)}
        if settings.seeds == 1 or (os.cpu_count() or 1) == 1:
            for way, task in tasks.items():
                result.runs[way] = _train_all(way, settings, output, partial(progress.advance, task))
        else:
            result.runs = _beside_each_other(settings, output, progress, tasks)
    result.seconds = time.perf_counter() - begin
    return result


def _beside_each_other(
    settings: NoisySettings, output: Path, progress: Progress, tasks: dict[str, Any]
) -> dict[str, list[NoisyRun]]:
    context = get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(len(tasks), context) as pool:
        counters = {way: manager.Value("i", 0) for way in tasks}
        futures = {way: pool.submit(_in_own_process, way, settings, output, counters[way]) for way in tasks}
        running = True
        while running:
            running = bool(wait(futures.values(), timeout=0.5).not_done)
            for way, task in tasks.items():
                progress.update(task, completed=counters[way].value)
        return {way: future.result() for way, future in futures.items()}


def _in_own_process(way: str, settings: NoisySettings, output: Path, counter: Any) -> list[NoisyRun]:
    def count() -> None:
        counter.value += 1

    return _train_all(way, settings, output, count)


def _train_all(way: str, settings: NoisySettings, output: Path, on_step: Callable[[], None]) -> list[NoisyRun]:
    disable_progress_bars()
    disable_progress_bar()  # ours is one for each way
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that TRL still uses, and that live routing replays nothing
        return [_train(way == REPLAY, seed, settings, output, on_step) for seed in range(settings.seeds)]


def _train(
    use_replay: bool, seed: int, settings: NoisySettings, output: Path, on_step: Callable[[], None]
) -> NoisyRun:
    model = AutoModelForCausalLM.from_pretrained(output / "start")
    model.set_experts_implementation("grouped_mm")  # the fastest at this size
    held_out = draw_batch(settings.held_out, LENGTH, torch.Generator().manual_seed(seed))
    before, clock = share_sorted(model, held_out), StepClock(on_step)
    with tempfile.TemporaryDirectory() as scratch:
        rows = make_rows(settings.prompts * settings.steps, LENGTH, seed)
        trainer = NoisyRolloutTrainer(
            model=model,
            args=_noisy_config(scratch, settings, use_replay, seed, output / "traces" if use_replay else None),
            reward_funcs=all_right,
            train_dataset=Dataset.from_list(rows),
            processing_class=sorting_tokenizer(),
            callbacks=[clock],
            measure_every=settings.measure_every,
            noise=settings.noise,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if use_replay and seed == 0:
        trainer.state.save_to_json(str(output / "trainer_state.json"))  # `trl-r3 report` draws it
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    return NoisyRun(before, share_sorted(model, held_out), trainer.measured, log, clock.median(trainer.measured))


def _noisy_config(
    folder: str, settings: NoisySettings, use_replay: bool, seed: int, traces: Path | None
) -> R3GRPOConfig:
    seldom = max(1, settings.steps // 4)
    return R3GRPOConfig(
        folder,
        use_routing_replay=use_replay,
        routing_replay_trace_dir=str(traces) if traces is not None and seed == 0 else None,
        routing_replay_trace_every=seldom,
        routing_replay_compare_every=seldom if use_replay else 0,
        per_device_train_batch_size=settings.prompts * settings.generations,
        num_generations=settings.generations,
        max_completion_length=LENGTH,
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        epsilon_high=0.27,
        **of_small_runs(seed),
    )
