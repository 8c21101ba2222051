"""A vLLM that several processes share, which TRL serves rightly only if each of them asks for as many completions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .._compat import swapped
from .turns import Prompts, SamplingTrainer


@contextmanager
def equal_shares(trainer: SamplingTrainer, remedy: str, group: Any = None) -> Iterator[None]:
    """
    Refuse, on all processes and before vLLM is asked, a turn for which they bring different numbers of prompts.

    TRL joins the prompts of all processes and gives each its own number of completions, counted from the rank times
    that number: where numbers differ these are completions, and records, of other prompts.

    Args:
        trainer ([`SamplingTrainer`]):
            The trainer.
        remedy (`str`):
            What to set instead.
        group (`torch.distributed.ProcessGroup`, *optional*):
            The processes that share an engine; all by default.

    Raises:
        `ValueError`: With the number of each process.
    """
    own_generate = trainer.vllm_generation.generate

    def generate(prompts: Prompts, *args: Any, **kwargs: Any) -> Any:
        counts: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(counts, len(prompts), group=group)
        if len(set(counts)) > 1:
            raise ValueError(
                f"the processes that share a vLLM bring {counts} prompts for one turn, by rank, and TRL would cut the "
                "completions as if each had brought as many: some would train on those of other prompts, whose routes "
                f"and masks are not theirs. Let each bring as many prompts to every turn, or set {remedy}."
            )
        return own_generate(prompts, *args, **kwargs)

    with swapped(trainer.vllm_generation, "generate", generate):
        yield
