"""
TRL's scoring head, restricted to the tokens that sampling kept.

The forward that TRL gives a model runs the backbone, gathers the head and casts what it casts, then hands hidden
states and head to one function. That function is exchanged while a batch with sampling masks is scored; everything
before and after it is TRL's.

Legend: B batch, T tokens of a padded sequence, N predictions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import scoring_head
from .kept_logprobs import Head, KeptLogProbs
from .masked_batch import KeptRows, MaskedBatch

_SCORED = {"log_probs", "entropy"}


class RestrictedHead:
    """
    In the place of TRL's chunked log-probabilities: the same arguments and outputs, over the kept tokens.

    Args:
        batch ([`MaskedBatch`]):
            What is scored, in order.
    """

    def __init__(self, batch: MaskedBatch):
        self.batch = batch
        self._inputs: tuple[Tensor, Tensor] | None = None  # ids (B, T), scored (B, T - 1)

    def see(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook of a forward: which tokens it scores."""
        if kwargs.get("fused_lm_head"):
            self._inputs = kwargs["input_ids"], kwargs["labels"][:, 1:] != -100

    def apply(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        """Log-probabilities, entropies, and nothing of what TRL's kernel can compute besides."""
        if not set(outputs) <= _SCORED:
            raise RuntimeError(
                f"the trainer scores {sorted(outputs)}, sampling masks know {sorted(_SCORED)}. Set "
                "`use_sampling_mask_replay=False`."
            )
        if self._inputs is None:
            raise RuntimeError("the head of a model was called by another forward than the one that is scored.")
        (input_ids, scored), self._inputs = self._inputs, None
        kept = self.batch.take(input_ids, scored)
        if len(hidden_NH) == len(kept.rows):  # TRL has left out what is not scored
            kept = KeptRows(_ranks(kept.rows), kept.counts, kept.ids)
        elif len(hidden_NH) != scored.numel():
            raise RuntimeError(
                f"TRL scores {len(hidden_NH)} predictions of a batch of {tuple(input_ids.shape)} tokens, of which "
                f"{len(kept.rows)} are sampled: these cannot be told apart. Set `use_sampling_mask_replay=False`."
            )
        if kept.ids.numel() and not 0 <= int(kept.ids.min()) <= int(kept.ids.max()) < len(weight_VH):
            raise ValueError(
                f"a sampling mask keeps ids from {int(kept.ids.min())} to {int(kept.ids.max())}, but the head of the "
                f"model has {len(weight_VH)} rows. Return the token ids of this model."
            )
        kind = hidden_NH.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_NH.dtype
        head = Head(temperature, final_logit_softcapping, logit_scale, dtype)
        scores = KeptLogProbs.apply(hidden_NH, weight_VH, bias_V, targets_N, kept, head, "entropy" in outputs)
        return (*scores, None, None, None)


def _ranks(rows: Tensor) -> Tensor:
    """The place of each row among all, in ascending order."""
    ranks = torch.empty_like(rows)
    ranks[rows.argsort()] = torch.arange(len(rows), device=rows.device)
    return ranks


@contextmanager
def restricted_head(model: nn.Module, batch: MaskedBatch) -> Iterator[None]:
    """
    Let forwards inside that score with TRL's head score over what sampling kept.

    Args:
        model (`torch.nn.Module`):
            What TRL calls, wrapped as it is.
        batch ([`MaskedBatch`]):
            The samples that are scored.

    Raises:
        `RuntimeError`: If not every sample was scored.
    """
    head = RestrictedHead(batch)
    handle = model.register_forward_pre_hook(head.see, with_kwargs=True)
    try:
        with scoring_head(head):
            yield
    finally:
        handle.remove()
    batch.check_done()
