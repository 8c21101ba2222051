"""Sampling masks of vLLM: with which settings it makes them, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..records.sampling_masks import SamplingMask


def check_mask_settings(args: Any) -> None:
    """
    Refuse settings with which vLLM makes no masks.

    Raises:
        `ValueError`: Naming the setting and what to change.
    """
    if args.vllm_mode == "server":
        raise ValueError(
            "`use_sampling_mask_replay=True` needs masks, but the endpoint of a vLLM server that TRL asks "
            "(`/v1/completions`) returns none. Set `vllm_mode='colocate'`, or `use_sampling_mask_replay=False`."
        )
    sampling = {"top_k": args.top_k, "temperature": args.temperature, **(args.generation_kwargs or {})}
    if (sampling["top_k"] or 0) <= 0:
        raise ValueError(
            f"vLLM returns sampling masks only with a positive `top_k`, which bounds their size, but it is "
            f"{sampling['top_k']}. Set `top_k=512`, or `use_sampling_mask_replay=False`."
        )
    if sampling["temperature"] <= 0:
        raise ValueError(
            f"vLLM returns sampling masks only where it samples, but `temperature` is {sampling['temperature']}. Set "
            "`temperature=1.0`, or `use_sampling_mask_replay=False`."
        )


def decode_vllm_mask(completion_output: Any, sample: int) -> SamplingMask:
    """
    Take the mask from a `CompletionOutput` of vLLM's `LLM.generate`.

    Args:
        completion_output (`vllm.CompletionOutput`):
            A finished completion.
        sample (`int`):
            Index that errors name.

    Returns:
        [`SamplingMask`].

    Raises:
        `ValueError`: If there is none, or not one list of ids a token.
    """
    mask = completion_output.sampling_mask
    if mask is None:
        raise ValueError(
            f"sample {sample}: `CompletionOutput.sampling_mask` is None: the engine returns none. Pass "
            "`return_sampling_mask=True` to `LLM`, with Model Runner V2 (VLLM_USE_V2_MODEL_RUNNER=1)."
        )
    rows: Sequence[Sequence[int]] = mask.token_ids
    tokens = len(completion_output.token_ids)
    empty = [position for position, row in enumerate(rows) if not len(row)]
    if len(rows) != tokens or empty:
        fact = f"the first empty one at position {empty[0]}" if empty else "none of them empty"
        raise ValueError(
            f"sample {sample}: vLLM returned {len(rows)} lists of kept ids for {tokens} sampled tokens, {fact}. "
            "Expected one list a token, with the sampled token in it. Set `use_sampling_mask_replay=False`."
        )
    return SamplingMask.of(rows)
