"""What the logits processors of `generate()` keep, and log-probabilities over that.

Legend: B sequences, T tokens of the returned sequences, P prompt tokens with padding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedModel

from .._compat import swapped
from ..records.sampling_masks import SamplingMask
from .generate_settings import check_decoding, recordable_kwargs
from .turns import Turn


def kept_rows(scores_BV: Tensor) -> list[Tensor]:
    """
    The ids of each row that can be drawn, `torch.int32` on the host.

    Args:
        scores_BV (`torch.Tensor` of shape `(B, V)`):
            Scores that a sampler draws from; what it may not draw has -inf.

    Returns:
        list of `torch.Tensor`: B of them, empty where nothing was cut.
    """
    kept_BV = scores_BV > -torch.inf
    counts_B = kept_BV.sum(1)
    whole_B = counts_B == scores_BV.shape[1]
    ids = (kept_BV & ~whole_B[:, None]).nonzero()[:, 1].int().cpu()
    return list(ids.split(counts_B.masked_fill(whole_B, 0).tolist()))


class KeptTokens(LogitsProcessor):
    """
    The last logits processor of a call of `generate`: it changes nothing.

    Args:
        lm (`torch.nn.Module`):
            The model that generates.
        temperature (`float`):
            What the trainer divides logits by.
    """

    def __init__(self, lm: nn.Module, temperature: float):
        self.temperature = temperature
        self.kept: list[list[Tensor]] = []  # by step, then by sequence
        self.logprobs: list[Tensor] = []  # (B,) by step
        self._logits: Tensor | None = None  # (B, V) of the last position
        self._open: Tensor | None = None  # (B, V), -inf where cut, of a step whose tokens are not known yet
        self.handle = lm.register_forward_hook(self._take)

    def _take(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._logits = output.logits[:, -1].detach().float() / self.temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert self._logits is not None  # of the forward that made the scores
        self.close(input_ids[:, -1])
        self.kept.append(kept_rows(scores))
        # not the scores: penalties move them, and the trainer knows none
        self._open = self._logits.masked_fill(scores == -torch.inf, -torch.inf)
        return scores

    def close(self, tokens: Tensor) -> None:
        """Score the `(B,)` tokens that the last step drew, if there was one."""
        if self._open is not None:
            chosen = self._open.gather(1, tokens[:, None])[:, 0]
            self.logprobs.append((chosen - self._open.logsumexp(1)).cpu())
            self._open = None


class KeptByGenerate:
    """The masks of one call of `generate`."""

    def __init__(self, processor: KeptTokens):
        self._processor = processor

    def turn(self, prompt_ids: Any, completion_ids: Any) -> Turn:
        """The turn of these tokens, without routes."""
        steps, values = self._processor.kept, self._processor.logprobs
        longest = max(map(len, completion_ids), default=0)
        if len(steps) != len(values) or longest > len(steps):
            raise RuntimeError(
                f"`generate` returned {longest} tokens, but its logits processors ran {len(steps)} times: something "
                "else drew its tokens. Set `use_sampling_mask_replay=False`."
            )
        masks = [
            SamplingMask.of([step[i] for step in steps[: len(completion)]])
            for i, completion in enumerate(completion_ids)
        ]
        logprobs_BC = torch.stack(values, 1) if values else torch.empty(len(completion_ids), 0)
        logprobs = [row[: len(completion)] for row, completion in zip(logprobs_BC, completion_ids, strict=True)]
        return Turn(prompt_ids, completion_ids, [], logprobs, masks)


@contextmanager
def kept_by_generate(model: Any, temperature: float) -> Iterator[KeptByGenerate]:
    """
    Record what one call of `model.generate` inside keeps.

    Args:
        model (`torch.nn.Module`):
            The model that generates.
        temperature (`float`):
            What the trainer divides logits by.

    Yields:
        [`KeptByGenerate`].

    Raises:
        `ValueError`: By `generate`, if it decodes in a way that draws other tokens than it processes.
    """
    lm: Any = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    own_generate, own_processors = model.generate, lm._get_logits_processor
    processor = KeptTokens(lm, temperature)

    def processors(*args: Any, **kwargs: Any) -> Any:
        found = own_processors(*args, **kwargs)
        found.append(processor)
        return found

    def generate(*args: Any, **kwargs: Any) -> Any:
        check_decoding(model, kwargs)
        output = own_generate(*args, **recordable_kwargs(kwargs))
        sequences = output if torch.is_tensor(output) else output.sequences
        processor.close(sequences[:, -1])
        return output

    try:
        with swapped(lm, "_get_logits_processor", processors), swapped(model, "generate", generate):
            yield KeptByGenerate(processor)
    finally:
        processor.handle.remove()
