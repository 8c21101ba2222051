"""The log-probabilities that `generate()` sampled with, which it does not return.

Legend: B sequences, P prompt tokens with padding, T tokens of the returned sequences, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SampledLogProbs:
    """Log-probabilities of sampled tokens, kept as (B,) a step: storing logits would take (B, T, V)."""

    def __init__(self, lm: nn.Module, temperature: float):
        self.temperature = temperature
        self.logits: Tensor | None = None  # (B, V) of the last position so far
        self.position = 0
        self.values: dict[int, Tensor] = {}  # by position of the token
        self.handles = [
            lm.register_forward_pre_hook(self._before, with_kwargs=True),
            lm.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        self._score(ids[:, 0])
        self.position += ids.shape[1]

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.logits = output.logits[:, -1].detach().float() / self.temperature

    def _score(self, token: Tensor) -> None:
        if self.logits is not None:
            token = token.to(self.logits.device)
            chosen = self.logits.gather(1, token[:, None])[:, 0]
            self.values[self.position] = chosen - self.logits.logsumexp(1)

    def of(self, sequences: Tensor, width: int) -> Tensor:
        """(B, T - P): one value a completion token."""
        if self.position == sequences.shape[1] - 1:
            self._score(sequences[:, -1])
        return torch.stack([self.values[position] for position in range(width, sequences.shape[1])], dim=1)
