"""What continuous batching keeps: processed scores of each packed step, by request and position.

Legend: D requests of a step that draw a token, V vocabulary, C completion tokens of a request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor

from .._compat import swapped
from ..records.sampling_masks import SamplingMask
from .continuous_batching import logits_of_draws
from .kept_tokens import kept_rows
from .turns import Turn


class KeptByBatches:
    """The masks of each request, collected over the steps of a call of `generate_batch`."""

    def __init__(self) -> None:
        self._drawn: dict[tuple[str, int], tuple[int, Tensor, float]] = {}  # token, kept ids, log-probability
        self.outputs: dict[str, Any] = {}

    def add(self, drew: Sequence[tuple[str, int]], tokens: Tensor, logits_DV: Tensor, scores_DV: Tensor) -> None:
        """
        Take what a step drew.

        Args:
            drew (sequence of `tuple[str, int]`):
                Request and position of each token.
            tokens (`torch.Tensor` of shape `(D,)`):
                The tokens.
            logits_DV (`torch.Tensor` of shape `(D, V)`):
                Logits of the model divided by the temperature.
            scores_DV (`torch.Tensor` of shape `(D, V)`):
                What was drawn from, -inf where cut.
        """
        over_kept = logits_DV.masked_fill(scores_DV == -torch.inf, -torch.inf)
        logprobs = over_kept.gather(1, tokens[:, None].long())[:, 0] - over_kept.logsumexp(1)
        kept = kept_rows(scores_DV)
        for key, token, ids, logprob in zip(drew, tokens.tolist(), kept, logprobs.tolist(), strict=True):
            # an evicted request is prefilled again; what was drawn first stays
            self._drawn.setdefault(key, (token, ids, logprob))

    def turn(self, prompt_ids: Any, completion_ids: Any) -> Turn:
        """The turn of these tokens, without routes."""
        masks, logprobs = [], []
        for (request, output), completion in zip(self.outputs.items(), completion_ids, strict=True):
            first = len(output.prompt_ids)
            drawn = [self._drawn.get((request, first + i)) for i in range(len(completion))]
            known = [each for each, token in zip(drawn, completion, strict=True) if each and each[0] == token]
            if len(known) != len(completion):
                raise RuntimeError(
                    f"{request} returned {len(completion)} tokens, of which its steps drew {len(known)}, so what "
                    "sampling kept is unknown. Generate without continuous batching."
                )
            masks.append(SamplingMask.of([ids for _, ids, _ in known]))
            logprobs.append(torch.tensor([logprob for _, _, logprob in known]))
        return Turn(prompt_ids, completion_ids, [], logprobs, masks)


@contextmanager
def kept_by_batches(model: Any, temperature: float) -> Iterator[KeptByBatches]:
    """
    Record what the steps of one call of `model.generate_batch` inside keep.

    Args:
        model (`torch.nn.Module`):
            The model that generates.
        temperature (`float`):
            What the trainer divides logits by.

    Yields:
        [`KeptByBatches`].
    """
    own_step, own_generate, kept = ContinuousBatchProcessor._generation_step, model.generate_batch, KeptByBatches()

    def step(processor: Any, model: Any) -> None:
        in_batch = processor.inputs_and_outputs.requests_in_batch
        drew = [(each.state.request_id, each.state.position_offset) for each in in_batch if each.has_new_token]
        runner, scores = processor.model_runner, []
        own_sample = runner._sample

        def sample(scores_1DV: Tensor, output_ids: Tensor) -> None:
            scores.append(scores_1DV[0, : len(drew)].detach())
            own_sample(scores_1DV, output_ids)

        with logits_of_draws(model, temperature, len(drew)) as logits, swapped(runner, "_sample", sample):
            own_step(processor, model)
        tokens = processor.inputs_and_outputs.output_ids[0, : len(drew)]
        kept.add(drew, tokens, logits[0], scores[0])

    def generate_batch(*args: Any, **kwargs: Any) -> Any:
        kept.outputs = own_generate(*args, **kwargs)
        return kept.outputs

    with swapped(ContinuousBatchProcessor, "_generation_step", step), swapped(model, "generate_batch", generate_batch):
        yield kept
