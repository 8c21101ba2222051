"""Sampling masks of vLLM: with which settings it makes them, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..records.sampling_mask import SamplingMask

MASKS_PATH = "/inference/v1/generate"  # of a server; `/v1/completions` returns no masks


def check_mask_settings(args: Any) -> None:
    """
    Refuse settings with which vLLM makes no masks.

    Raises:
        `ValueError`: Naming the setting and what to change.
    """
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


def decode_vllm_mask(rows: Sequence[Sequence[int]] | None, num_tokens: int, sample: int) -> SamplingMask:
    """
    Read the mask of a finished completion.

    Args:
        rows (sequence of sequence of `int`, *optional*):
            `sampling_mask.token_ids` of a `CompletionOutput`, or `sampling_mask` of a server's choice.
        num_tokens (`int`):
            Sampled tokens of the completion.
        sample (`int`):
            Index that errors name.

    Returns:
        [`SamplingMask`].

    Raises:
        `ValueError`: If there is none, or not one list of ids a token.
    """
    if rows is None:
        raise ValueError(
            f"sample {sample}: `sampling_mask` of the completion is None: the engine returns none. Switch "
            "`return_sampling_mask` on where it is started, with Model Runner V2 (VLLM_USE_V2_MODEL_RUNNER=1)."
        )
    empty = [position for position, row in enumerate(rows) if not len(row)]
    if len(rows) != num_tokens or empty:
        fact = f"the first empty one at position {empty[0]}" if empty else "none of them empty"
        raise ValueError(
            f"sample {sample}: vLLM returned {len(rows)} lists of kept ids for {num_tokens} sampled tokens, {fact}. "
            "Expected one list a token, with the sampled token in it. Set `use_sampling_mask_replay=False`."
        )
    return SamplingMask.of(rows)
