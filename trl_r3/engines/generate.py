"""Transformers' `generate()` with the routes of its rollout.

Legend: B sequences (prompts times `num_return_sequences`), P prompt tokens with padding, T tokens of the returned
sequences, L MoE layers, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..records.sources import RecordedRoutes
from ..routers.router_replay import RouterReplay
from .generate_settings import check_decoding, prompt_mask, recordable_kwargs, routed_positions
from .sampled_logprobs import SampledLogProbs


@dataclass
class Rollout:
    """One call of `generate` with its routes."""

    output: Any  # what `generate` returned
    sequences: Tensor  # (B, T)
    prompt_width: int
    records: Tensor  # packed (B, T, L, K), missing where nothing was routed
    logprobs: Tensor | None  # (B, T - P), of the sampled tokens


def generate_with_routes(
    model: nn.Module,
    replay: RouterReplay,
    generate: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    temperature: float | None = None,
    mask_after_end: bool = True,
) -> Rollout:
    """
    Call `generate` and record every forward in it.

    Args:
        model (`torch.nn.Module`):
            The model that generates.
        replay ([`RouterReplay`]):
            Its handle.
        generate (`Callable`):
            Its own `generate`.
        args, kwargs:
            Arguments for it.
        temperature (`float`, *optional*):
            If given, the log-probabilities of the sampled tokens are returned: of the model's logits divided by it,
            before any truncation of the distribution, as the trainer scores them.
        mask_after_end (`bool`, *optional*, defaults to `True`):
            Whether rows of padding and after the end of a sequence are missing. A caller that knows the lengths does
            without.

    Returns:
        [`Rollout`].

    Raises:
        `ValueError`: If the way of decoding does not feed every token once, in order.
    """
    check_decoding(model, kwargs)
    lm = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    sampled = SampledLogProbs(lm, temperature) if temperature is not None else None
    try:
        with replay.record() as recorded:
            output = generate(*args, **recordable_kwargs(kwargs))
    finally:
        if sampled is not None:
            sampled.remove()
    sequences = output if torch.is_tensor(output) else output.sequences
    prompt = next(
        a for a in (args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids")) if a is not None
    )
    width = prompt.shape[1]
    _check_fed(recorded, sequences, width)
    records = torch.nn.functional.pad(
        recorded.packed[:, : sequences.shape[1] - 1], (0, 0, 0, 0, 0, 1), value=replay.layout.missing
    )
    if mask_after_end:
        routed_BT = routed_positions(model, sequences, width, prompt_mask(model, prompt, kwargs), kwargs)
        records = records.masked_fill_(~routed_BT[:, :, None, None].to(records.device), replay.layout.missing)
    logprobs = sampled.of(sequences, width) if sampled is not None else None
    return Rollout(output, sequences, width, records, logprobs)


def _check_fed(recorded: RecordedRoutes, sequences: Tensor, width: int) -> None:
    """
    Refuse routes of other tokens than those returned. Forwards beyond the end do no harm: `generate` may stop late.
    """
    if not recorded.forwards:
        raise RuntimeError(
            "`generate` returned without a forward of the model, so there is nothing to record: something else made "
            "its sequences. Let the model generate them, or set `use_routing_replay=False`."
        )
    num_rows = sequences.shape[1] - 1
    fed = sum(forward.shape[1] for forward in recorded.forwards)
    known = [tokens for tokens in recorded.tokens if tokens is not None]
    if len(known) == len(recorded.forwards):
        tokens = torch.cat(known, dim=1)[:, :num_rows]
        same = torch.equal(tokens, sequences[:, :num_rows].to(tokens.device))
    else:
        same = fed == num_rows  # a vision-language model feeds embeddings
    if not same:
        raise RuntimeError(
            f"`generate` fed {fed} tokens in {len(recorded.forwards)} forwards, but not the first {num_rows} tokens "
            f"of the sequences one after the other (prompt of {width}): its cache was off or held a part of the "
            "prompt, or something else called the model meanwhile. Set `use_cache=True`, pass no `cache` (before "
            "Transformers 5.24: `past_key_values`), disable gradient checkpointing while generating, and use no "
            "logits processor that calls the model."
        )
