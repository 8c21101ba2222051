"""
Quirks of what makes rollouts and of how weights reach it: vLLM, `generate`, PEFT's merges. Each with the condition
under which it can go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .._compat import swapped


def name_tokens(choices: list[dict[str, Any]]) -> None:
    """
    Give log-probabilities of `/inference/v1/generate` the names that TRL 1.16 reads: vLLM 0.32 tells a `token_id`,
    0.30 a `token`. Goes when TRL reads both.
    """
    for choice in choices:
        for entry in (choice.get("logprobs") or {}).get("content") or ():
            for each in (entry, *(entry.get("top_logprobs") or ())):
                if "token_id" in each:
                    each.setdefault("token", f"token_id:{each['token_id']}")


def pause_in_mode_keep(llm: Any) -> None:
    """
    Let `llm.sleep` pause in mode "keep" unless told otherwise. A vLLM 0.31 that returns routes empties its caches,
    which every sleep does, only after that; TRL names no mode. Goes with vLLM 0.31, or when TRL names the mode.
    """
    own = llm.sleep

    def sleep(level: int = 1, mode: str = "keep") -> Any:
        return own(level=level, mode=mode)

    llm.sleep = sleep


@contextmanager
def last_processor(lm: Any, process: Callable) -> Iterator[None]:
    """
    Let `generate` of a model end its list of logits processors with `process(input_ids, scores)`. Goes when
    `logits_processor` is applied behind the sampling settings, or `generate` returns what they kept.
    """
    own = lm._get_logits_processor

    def processors(*args: Any, **kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        found.append(process)
        return found

    with swapped(lm, "_get_logits_processor", processors):
        yield


@contextmanager
def noted_ends(lm: Any, note: Callable[[torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """
    Call `note(ended, tokens)`, both of shape (B,), after each token of `generate`, where it feeds padding to sequences
    that have ended. Goes when `generate` tells a user's function so.
    """
    from transformers import StoppingCriteriaList

    own = lm._get_stopping_criteria

    class Noted(StoppingCriteriaList):
        def __call__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.BoolTensor:
            done = super().__call__(input_ids, *args, **kwargs)
            if any(hasattr(each, "eos_token_id") for each in self):  # else it goes on to sample
                note(done, input_ids[:, -1])
            return done

    with swapped(lm, "_get_stopping_criteria", lambda *args, **kwargs: Noted(own(*args, **kwargs))):
        yield


@contextmanager
def batching_step(step: Callable) -> Iterator[None]:
    """
    Let each step of continuous batching be `step(own_step, processor, model)`. Goes when Transformers calls a user's
    function before and after a step.
    """
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor

    own = ContinuousBatchProcessor._generation_step
    with swapped(ContinuousBatchProcessor, "_generation_step", lambda *args: step(own, *args)):
        yield


@contextmanager
def batching_sampler(processor: Any, scores: list[torch.Tensor]) -> Iterator[None]:
    """
    Keep the (1, D, V) scores that a step of continuous batching draws from. Goes when its logits processors can be
    followed by one of the user's.
    """
    runner = processor.model_runner
    own = runner._sample

    def sample(scores_1DV: torch.Tensor, output_ids: torch.Tensor) -> None:
        scores.append(scores_1DV.detach())
        own(scores_1DV, output_ids)

    with swapped(runner, "_sample", sample):
        yield


@contextmanager
def forgotten_merge(layer: Any) -> Iterator[None]:
    """
    Let a layer of PEFT remember no merge that is made inside: it notes which adapters are in, and DoRA the norms of
    the weights before. Goes when PEFT returns merged weights and changes nothing.
    """
    notes, before = layer.merged_adapters, list(layer.merged_adapters)
    caches = getattr(layer, "_caches", {})
    cached = dict(caches)
    try:
        yield
    finally:
        notes[:] = before
        caches.clear()
        caches.update(cached)
