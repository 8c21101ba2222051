"""In how many files of the package a training step with replay runs: what somebody has to read who wants to follow it.

One step rolls out with `generate`, one takes the answer of a colocated vLLM, which is told by arithmetic here. Options
are off: the alarm, and skipping padding.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

import trl_r3
from trl_r3 import R3GRPOConfig, R3GRPOTrainer
from trl_r3.cli.demo.policy import build_tokenizer, make_sums, qwen3_config

PACKAGE = Path(trl_r3.__file__).parent


class ToldVLLM:
    """`VLLMGeneration` of TRL as far as colocate mode uses it: each prompt is answered, and its routes are told."""

    tensor_parallel_size = 1

    def __init__(self, layers: int, num_experts: int, top_k: int):
        self.shape, self.num_experts = (layers, top_k), num_experts
        self.llm = SimpleNamespace(generate=self._answer)

    def sync_weights(self) -> None:
        """There are none."""

    def generate(self, prompts: list[list[int]], images: None, num_generations: int, profiler: Any) -> tuple:
        """As TRL's, from the outputs of the engine."""
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        completions = [output.outputs[0].token_ids for output in self.llm.generate(inputs, sampling_params=None)]
        return prompts, completions, [[[-1.0]] * len(ids) for ids in completions], None

    def _answer(self, prompts: list[dict], sampling_params: Any, **kwargs: Any) -> list:
        return [self._output(prompt["prompt_token_ids"]) for prompt in prompts]

    def _output(self, prompt: list[int]) -> SimpleNamespace:
        completion = [1 + (sum(prompt) + i) % 10 for i in range(4)]
        rows = len(prompt) + len(completion) - 1
        first = np.arange(rows * self.shape[0]).reshape(rows, self.shape[0], 1)
        routes = ((first + np.arange(self.shape[1])) % self.num_experts).astype(np.uint8)
        answer = SimpleNamespace(token_ids=completion, routed_experts=routes)
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[answer])


class OneStep(TrainerCallback, contextlib.AbstractContextManager):
    """Notes the files of the package of which a function runs, on any thread, once the model has been prepared."""

    def __init__(self):
        self.seen: set[str] = set()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The trainer is attached by now."""
        sys.setprofile(self._note)
        threading.setprofile(self._note)

    def __exit__(self, *exception: Any) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _note(self, frame: Any, event: str, arg: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            self.seen.add(path.relative_to(PACKAGE).as_posix())


def files_of_a_step(by_vllm: bool) -> set[str]:
    """Of one training step: rollout, scoring, update, log, and what is left behind it."""
    config = qwen3_config()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = R3GRPOTrainer(
            model=AutoModelForCausalLM.from_config(config),
            args=R3GRPOConfig(
                folder, use_routing_replay=True, routing_replay_alarm="off",
                routing_replay_padding="keep", use_cpu=True, bf16=False, max_steps=1,
                logging_steps=1, per_device_train_batch_size=4, num_generations=2, max_completion_length=6,
                save_strategy="no", report_to=[], disable_tqdm=True,
            ),
            reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
            train_dataset=Dataset.from_list([{"prompt": problem.prompt} for problem in make_sums(9)]),
            processing_class=build_tokenizer(),
        )  # fmt: skip
        if by_vllm:
            trainer.use_vllm, trainer.vllm_mode = True, "colocate"
            trainer.vllm_generation = ToldVLLM(
                config.num_hidden_layers, config.num_experts, config.num_experts_per_tok
            )
            trainer.vllm_importance_sampling_correction, trainer._last_loaded_step = False, 0
        step = OneStep()
        trainer.add_callback(step)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), step:
            trainer.train()
    return step.seen


def run() -> None:
    """Print both, and their union."""
    by_engine = {"generate": files_of_a_step(by_vllm=False), "a colocated vLLM": files_of_a_step(by_vllm=True)}
    for file in sorted(set().union(*by_engine.values())):
        print(f"{file:28}", ", ".join(name for name, files in by_engine.items() if file in files))
    for name, files in by_engine.items():
        print(f"{len(files)} files with {name}")
    print(f"{len(set().union(*by_engine.values()))} files in all")
