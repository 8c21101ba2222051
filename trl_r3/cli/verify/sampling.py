"""A rollout to verify, wherever it comes from: tokens, routes as they came, log-probabilities.

Legend: B samples, P prompt tokens, C completion tokens, S layer slots (MoE layers, or decoder layers), K experts per
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

TEMPERATURE = 0.7  # other than 1, so that a side that forgets it is seen
PROCESSED = "processed_logprobs"

_PROMPTS, _SHARED, _NEW_TOKENS = 16, 16, 32
_LONGEST = 8  # tokens of a prompt behind what they share


@dataclass
class VerifiedRollout:
    """
    What an engine returned, unchecked.

    Args:
        source (`str`):
            Where it comes from, for the reader.
        prompt_ids, completion_ids (sequence of `list[int]`):
            Tokens of each sample.
        routes (sequence of `numpy.ndarray` or `torch.Tensor` of shape `(P + C - 1, S, K)`, *optional* each):
            Expert ids of any integer dtype; a row of -1 is missing. `None` for a sample without routes.
        logprobs (sequence of `torch.Tensor` of shape `(C,)`, *optional*):
            Of the sampled tokens, as the engine returned them.
        temperature (`float`, *optional*, defaults to 0.7):
            What the engine was asked to sample with.
        logprobs_mode (`str`, *optional*):
            What its configuration says about its log-probabilities, if anything.
        version (`str`, *optional*):
            Of the engine.
        notes (`list[str]`):
            What the decoder of the routes had to say, an entry a refused sample.
        untruncated (`bool`, *optional*, defaults to `True`):
            Whether the engine sampled from the whole vocabulary.
    """

    source: str
    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    routes: Sequence[np.ndarray | Tensor | None]
    logprobs: Sequence[Tensor] | None
    temperature: float = TEMPERATURE
    logprobs_mode: str | None = None
    version: str | None = None
    notes: list[str] = field(default_factory=list)
    untruncated: bool = True


@dataclass(frozen=True)
class Sampling:
    """
    What an engine is asked for.

    Args:
        prompt_ids (`list[list[int]]`):
            The first one is sent alone: the others share its beginning, which a prefix cache then serves.
        new_tokens (`int`):
            Length of each completion.
        temperature (`float`):
            Of the sampling, from the whole vocabulary.
    """

    prompt_ids: list[list[int]]
    new_tokens: int = _NEW_TOKENS
    temperature: float = TEMPERATURE

    @property
    def parts(self) -> list[list[list[int]]]:
        """Prompts of each call of the engine."""
        return [self.prompt_ids[:1], self.prompt_ids[1:]]

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(map(len, self.prompt_ids)) + self.new_tokens


def generated_prompts(model: Any, seed: int = 0) -> list[list[int]]:
    """
    Prompts of different lengths that begin alike, of token ids that any vocabulary has; no tokenizer is needed.

    Special tokens stand at the beginning or at the end of a vocabulary, so none of these is one.
    """
    size = model.config.get_text_config().vocab_size  # a weight that is sharded has another shape
    low, high = max(1, size // 8), max(3, size // 2)
    draws = torch.Generator().manual_seed(seed)
    shared = torch.randint(low, high, (_SHARED,), generator=draws).tolist()
    own = torch.randint(low, high, (_PROMPTS, _LONGEST), generator=draws).tolist()
    return [shared + tail[: 1 + i % _LONGEST] for i, tail in enumerate(own)]
