"""What `generate()` samples: log-probabilities of its tokens, and what was left to draw them from.

Legend: B sequences, T tokens of the returned sequences, C of their completions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..records.metrics import drawn_logprobs
from ..records.sampling_mask import kept_rows


def drawn_tokens(completions_BC: Tensor, ends: Sequence[int]) -> Tensor:
    """(B, C) of `bool`: the tokens of completions up to the first end; behind it `generate` puts padding."""
    is_end_BC = torch.isin(completions_BC, torch.tensor(list(ends), dtype=torch.int64, device=completions_BC.device))
    return is_end_BC.int().cumsum(1) - is_end_BC.int() == 0


class SampledTokens:
    """
    What `generate()` sampled: log-probabilities, kept as (B,) a step (storing logits would take (B, T, V)), and, where
    its last logits processor is [`SampledTokens.keep`], the ids that were left to draw from.
    """

    def __init__(self, lm: nn.Module, temperature: float):
        self.temperature = temperature
        self.logits: Tensor | None = None  # (B, V) of the last position so far, -inf where it was cut
        self.position = 0  # tokens that have been fed
        self.values: dict[int, Tensor] = {}  # by position of the sampled token
        self.kept: dict[int, list[Tensor]] = {}  # likewise
        self.handles = [
            lm.register_forward_pre_hook(self._before, with_kwargs=True),
            lm.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def keep(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        """Note what can be drawn from scores; they stay as they are."""
        assert self.logits is not None  # of the forward that made the scores
        self.kept[self.position] = kept_rows(scores_BV)
        # not the scores: penalties move them, and the trainer knows none
        self.logits = self.logits.masked_fill(scores_BV == -torch.inf, -torch.inf)
        return scores_BV

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        self._score(ids[:, 0])
        self.position += ids.shape[1]

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.logits = output.logits[:, -1].detach().float() / self.temperature

    def _score(self, token_B: Tensor) -> None:
        if self.logits is not None:
            self.values[self.position] = drawn_logprobs(self.logits, token_B.to(self.logits.device))

    def logprobs(self, sequences: Tensor, drawn_BC: Tensor) -> Tensor:
        """(B, C): one value a completion token, NaN where it was not drawn."""
        if self.position == sequences.shape[1] - 1:
            self._score(sequences[:, -1])
        width = sequences.shape[1] - drawn_BC.shape[1]
        values = [self.values[position] for position in range(width, sequences.shape[1])]
        scored_BC = torch.stack(values, dim=1) if values else torch.empty(len(sequences), 0)
        return scored_BC.masked_fill(~drawn_BC.to(scored_BC.device), torch.nan)

    def kept_at(self, sequences: Tensor, drawn_BC: Tensor) -> list[list[Tensor]]:
        """By completion token, then by sequence; nothing where it was not drawn."""
        positions = range(sequences.shape[1] - drawn_BC.shape[1], sequences.shape[1])
        lacking = [position for position in positions if position not in self.kept]
        if lacking:
            raise RuntimeError(
                f"`generate` returned {len(positions)} tokens, but its logits processors ran for "
                f"{len(positions) - len(lacking)} of them: something else drew the others. Set "
                "`use_sampling_mask_replay=False`."
            )
        return [
            [ids if is_drawn else ids[:0] for ids, is_drawn in zip(self.kept[position], drawn_B, strict=True)]
            for position, drawn_B in zip(positions, drawn_BC.T.tolist(), strict=True)
        ]
