"""`python -m benchmarks padding`: what is saved where layers see real tokens only.

An update of a model, its old-policy pass, the prefill of a rollout, and whole GRPO steps, each live, with padding and
without, by turns in one process.

Legend: B batch, T tokens of a padded sequence.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOTrainer

from trl_r3 import R3GRPOConfig, R3GRPOTrainer
from trl_r3.cli.demo.policy import build_tokenizer
from trl_r3.engines.generate import generate_with_routes
from trl_r3.routers.router_replay import RouterReplay

from .setup import BenchSettings, Finding, in_turn, large_model, random_ids, record_of
from .unpadded import mask_of, unpadded_bits, unpadded_memory

ARMS = ("live", "keep", "auto")
TARGETS = {0.0: 1.02, 0.25: 0.80, 0.5: 0.60, 0.71: 0.45}  # by the share of padding: without it over live


def medians(prepare: Callable[[str], AbstractContextManager[Callable[[], Any]]], rounds: int) -> dict[str, float]:
    """Processor seconds of what is made ready for each arm, or what it says, by turns; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for turn in range(rounds + 1):
        for name in ARMS:
            with prepare(name) as run:
                begin = time.process_time()
                taken = run()
                if turn:
                    seconds[name].append(taken if isinstance(taken, float) else time.process_time() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def model_cost(
    settings: BenchSettings,
    share: float,
    target: float,
    rounds: int,
    *,
    attention: str = "sdpa",
    size: int | None = None,
) -> list[Finding]:
    """An update of AdamW, and an old-policy pass, of one model; in micro-batches of a size, if one is given."""
    model, size = large_model(settings).train(), size or settings.batch
    model.set_attn_implementation(attention)
    ids, mask = random_ids(model, settings.batch, settings.length), mask_of(settings.batch, settings.length, share)
    labels = ids.masked_fill((mask & mask.roll(1, 1)) == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    with RouterReplay(model) as replay:
        record = record_of(model, replay, ids)

    def forwards(replay: RouterReplay | None, **kwargs: Tensor) -> Iterator[Any]:
        for first in range(0, settings.batch, size):
            part = slice(first, first + size)
            with replay.replay(record[part]) if replay else nullcontext():
                given = {name: value[part] for name, value in kwargs.items()}
                yield model(input_ids=ids[part], attention_mask=mask[part], use_cache=False, **given)

    def update(replay: RouterReplay | None) -> None:
        for output in forwards(replay, labels=labels):
            output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def score(replay: RouterReplay | None) -> None:
        with torch.no_grad():
            for _ in forwards(replay):
                pass

    findings, share = [], 1 - mask.float().mean().item()
    how = f"{'' if size == settings.batch else f' in micro-batches of {size}'}"
    how += "" if attention == "sdpa" else f", {attention} attention"
    runs: dict[str, tuple[Callable, float | None]] = {f"update{how}": (update, target)}
    if not how:
        runs["old-policy pass"] = score, 0.6 if target == 0.6 else None
    for what, (run, bound) in runs.items():

        @contextmanager
        def prepare(name: str, run: Callable = run) -> Iterator[Callable[[], None]]:
            with ExitStack() as stack:
                handle = None if name == "live" else stack.enter_context(RouterReplay(model, padding=name))
                yield lambda: run(handle)

        findings += compared(f"{what}, {share:.0%} padding", medians(prepare, rounds), bound)
    return findings


def compared(what: str, seconds: dict[str, float], target: float | None, how: str = "replayed") -> list[Finding]:
    """The lines of one comparison."""
    return [
        Finding(f"{what}: {how} with padding over live", seconds["keep"] / seconds["live"]),
        Finding(f"{what}: {how} without over live", seconds["auto"] / seconds["live"], target),
    ]


def prefill_cost(settings: BenchSettings, rounds: int) -> list[Finding]:
    """`generate` of one token, behind prompts of unequal length."""
    model, mask = large_model(settings).eval(), mask_of(settings.batch, settings.length, 0.5).flip(1)
    mask[:, -1] = 1  # a prompt ends where its completion begins
    kwargs = {"input_ids": random_ids(model, *mask.shape), "attention_mask": mask, "max_new_tokens": 1}

    @contextmanager
    def prepare(name: str) -> Iterator[Callable[[], Any]]:
        if name == "live":
            yield lambda: model.generate(**kwargs)
            return
        with RouterReplay(model, padding=name) as replay:
            yield lambda: generate_with_routes(model, replay, model.generate, (), kwargs)

    share = 1 - mask.float().mean().item()
    return compared(f"prefill, {share:.0%} padding", medians(prepare, rounds), 0.75, "recorded")


class Steps(TrainerCallback):
    """Processor seconds of the steps of a training, without what comes once before: loading and attaching."""

    begin = seconds = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """When all is prepared."""
        self.begin = time.process_time()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """After the last update."""
        self.seconds = time.process_time() - self.begin


def step_cost(settings: BenchSettings, rounds: int) -> list[Finding]:
    """Whole steps of GRPO, an old-policy pass and four updates of a rollout whose completions are told."""
    batch, lengths = 2 * settings.batch, torch.linspace(8, settings.length - 8, 2 * settings.batch).long().tolist()

    def play(prompts: list[str], trainer: Any) -> dict[str, list]:
        prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        completions = [[3 + (i + j) % 9 for j in range(length)] for i, length in enumerate(lengths[: len(prompts)])]
        rows = [len(p) + len(c) - 1 for p, c in zip(prompt_ids, completions, strict=True)]
        experts = torch.rand(max(rows), settings.num_layers, settings.num_experts).argsort(-1)[..., : settings.top_k]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completions,
            "logprobs": [[-1.0] * len(ids) for ids in completions],
            "routed_experts": [experts[:count].clone() for count in rows],
        }

    @contextmanager
    def prepare(name: str) -> Iterator[Callable[[], Any]]:
        with tempfile.TemporaryDirectory() as folder:
            args = R3GRPOConfig(
                folder, use_cpu=True, bf16=False, per_device_train_batch_size=settings.batch, num_generations=2,
                gradient_accumulation_steps=1, steps_per_generation=2, num_iterations=2, max_steps=4, report_to=[],
                max_completion_length=settings.length, save_strategy="no", disable_tqdm=True, logging_steps=100,
                use_routing_replay=name != "live", routing_replay_padding=name if name != "live" else "keep",
                routing_replay_alarm="off", gradient_checkpointing=False, log_level="error",
            )  # fmt: skip
            trainer = (GRPOTrainer if name == "live" else R3GRPOTrainer)(
                model=large_model(settings),
                args=args,
                reward_funcs=lambda completion_ids, **kwargs: [float(len(ids) % 7) for ids in completion_ids],
                train_dataset=Dataset.from_dict({"prompt": ["1+2=", "12+34="] * batch}),
                processing_class=build_tokenizer(),
                rollout_func=play,
            )
            steps = Steps()
            trainer.add_callback(steps)
            yield lambda: (trainer.train(), steps.seconds)[1]

    share = 1 - sum(lengths) / len(lengths) / max(lengths)
    return compared(f"GRPO step, {share:.0%} padding", medians(prepare, rounds), 0.6)


def run(settings: BenchSettings | None = None, rounds: int = 5) -> list[Finding]:
    """
    Measure and print.

    Args:
        settings ([`BenchSettings`], *optional*):
            Sizes.
        rounds (`int`, *optional*, defaults to `5`):
            Measurements of each arm.

    Returns:
        list of [`Finding`].
    """
    torch.set_num_threads(1)
    settings = settings or BenchSettings(num_layers=4)
    shares = {
        f"{share:.0%} padding": partial(model_cost, settings, share, target, rounds)
        for share, target in TARGETS.items()
    }
    findings = in_turn(
        {
            **shares,
            "micro-batches": partial(model_cost, settings, 0.5, 0.75, rounds, size=1),
            "eager attention": partial(model_cost, settings, 0.5, 0.80, rounds, attention="eager"),
            "prefill": partial(prefill_cost, settings, rounds),
            "GRPO step": partial(step_cost, settings, rounds),
            "memory": partial(unpadded_memory, settings),
            "gradients": partial(unpadded_bits, settings),
        }
    )
    for each in findings:
        bound = "" if each.target is None else f"  (target {each.target:.2f}{'' if each.met else ', missed'})"
        print(f"{each.what:64s} {each.value:.3f}{bound}")
    return findings
