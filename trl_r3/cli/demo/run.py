"""Warm a small model up, then train it twice from the same weights: without replay and with it."""

from __future__ import annotations

import copy
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from ...trainers.grpo import R3GRPOConfig
from ..twin import one_thread
from .low_precision import LowPrecisionRolloutTrainer
from .policy import CONFIGS, Sum, accuracy, build_tokenizer, make_sums, warm_up
from .settings import DemoSettings, of_small_runs

RUNS = {"without replay": False, "with replay": True}


@dataclass
class RunResult:
    """One GRPO run."""

    accuracy_before: float
    accuracy_after: float
    measured: list[dict[str, float]]  # a dict a measured step
    log: list[dict[str, float]]  # what TRL logged, a dict a step
    seconds_per_step: float  # of the processor, median of the steps whose mismatch was not measured


@dataclass
class DemoResult:
    """What a demo leaves."""

    parameters: int
    seconds: float = 0.0
    warm_up_seconds: float = 0.0
    runs: dict[str, RunResult] = field(default_factory=dict)


def exact_answer(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """1 for the right sum, 0 for anything else."""
    return [float(text.replace(" ", "") == expected) for text, expected in zip(completions, answer, strict=True)]


class StepClock(TrainerCallback):
    """Processor seconds of each step: on a shared machine they say more than those on the wall."""

    def __init__(self, on_step: Callable[[], None]):
        self.on_step = on_step
        self.begin = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.begin)
        self.on_step()

    def median(self, measured: Sequence[dict[str, float]]) -> float:
        """Of the steps that were not measured, which takes time of its own."""
        steps = {entry["step"] for entry in measured}
        return statistics.median(seconds for step, seconds in enumerate(self.seconds) if step not in steps)


def run_demo(name: str, settings: DemoSettings, output: Path, console: Any) -> DemoResult:
    """
    Run the demo.

    Args:
        name (`str`):
            Key of [`CONFIGS`].
        settings ([`DemoSettings`]):
            Sizes.
        output (`Path`):
            Folder; the warmed-up model is saved to `start` in it.
        console (`rich.console.Console`):
            Where progress is shown.

    Returns:
        [`DemoResult`].
    """
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    begin = time.perf_counter()
    with one_thread(), Progress(*columns, console=console) as progress:
        total = {"warm-up": settings.warm_up_steps, **dict.fromkeys(RUNS, settings.grpo_steps)}
        tasks = {phase: progress.add_task(phase, total=steps, start=False) for phase, steps in total.items()}

        def start(phase: str) -> Callable[[], None]:
            progress.start_task(tasks[phase])
            return lambda: progress.advance(tasks[phase])

        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
        result = DemoResult(sum(parameter.numel() for parameter in model.parameters()))
        tokenizer, (train, held_out) = build_tokenizer(), _split(settings)
        _warm_up(model, tokenizer, train, settings, start("warm-up"))
        result.warm_up_seconds = time.perf_counter() - begin
        model.save_pretrained(output / "start")
        tokenizer.save_pretrained(output / "start")
        before = accuracy(model, tokenizer, held_out)
        for run, use_replay in RUNS.items():
            with tempfile.TemporaryDirectory() as scratch:
                args = _config(scratch, settings, use_replay)
                clock = StepClock(start(run))
                trainer = _trainer(copy.deepcopy(model), tokenizer, train, args, settings.measure_every, clock)
                trainer.train()
            after = accuracy(trainer.model, tokenizer, held_out)
            result.runs[run] = _result(trainer, clock, before, after)
    result.seconds = time.perf_counter() - begin
    return result


def _split(settings: DemoSettings) -> tuple[list[Sum], list[Sum]]:
    sums = make_sums(settings.largest)
    random.Random(settings.seed).shuffle(sums)
    return sums[settings.held_out :], sums[: settings.held_out]


def _warm_up(
    model: Any, tokenizer: PreTrainedTokenizerFast, train: Sequence[Sum], settings: DemoSettings, on_step: Callable
) -> None:
    warm_up(
        model,
        tokenizer,
        train,
        steps=settings.warm_up_steps,
        batch_size=settings.warm_up_batch,
        learning_rate=settings.warm_up_learning_rate,
        seed=settings.seed,
        on_step=on_step,
    )


def _config(folder: str, settings: DemoSettings, use_replay: bool) -> R3GRPOConfig:
    return R3GRPOConfig(
        folder,
        use_routing_replay=use_replay,
        per_device_train_batch_size=settings.prompts * settings.generations,
        num_generations=settings.generations,
        max_completion_length=len(str(2 * settings.largest)) + 1,
        max_steps=settings.grpo_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.grpo_steps // 20,
        **of_small_runs(settings.seed),
    )


def _trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    train: Sequence[Sum],
    args: R3GRPOConfig,
    measure_every: int,
    clock: StepClock,
) -> LowPrecisionRolloutTrainer:
    dataset = Dataset.from_list([{"prompt": problem.prompt, "answer": problem.answer} for problem in train])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*so nothing is replayed", RuntimeWarning)  # one of the runs is to be so
        trainer = LowPrecisionRolloutTrainer(
            model=model,
            args=args,
            reward_funcs=exact_answer,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[clock],
            measure_every=measure_every,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _result(trainer: LowPrecisionRolloutTrainer, clock: StepClock, before: float, after: float) -> RunResult:
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    return RunResult(before, after, trainer.measured, log, clock.median(trainer.measured))
