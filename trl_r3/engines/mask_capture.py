"""Record what the sampler of TRL's rollout engine keeps, whichever engine it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..records.sampling_masks import SamplingMask
from .capture import Prompts, colocated_outputs, own_completions, share_of_server
from .kept_batches import kept_by_batches
from .kept_tokens import kept_by_generate
from .turns import RolloutRecord, Turn
from .vllm_masks import decode_vllm_mask


@contextmanager
def capture_masks(trainer: Any) -> Iterator[Callable[[Prompts, Prompts], Turn]]:
    """
    Record one call of `trainer._generate_single_turn`.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer; its settings tell the engine.

    Yields:
        What makes the [`Turn`] once the call has returned: masks, and where Transformers generates log-probabilities
        over what they keep.
    """
    if trainer.use_vllm and trainer.vllm_mode == "server":
        yield lambda prompt_ids, completion_ids: Turn(
            prompt_ids, completion_ids, [], masks=share_of_server(trainer, "take_masks", len(prompt_ids))
        )
        return
    if trainer.use_vllm:
        with colocated_outputs(trainer, lambda prompts, sampling: sampling) as outputs:

            def make_turn(prompt_ids: Prompts, completion_ids: Prompts) -> Turn:
                completions = [completion for output in outputs for completion in output.outputs]
                completions = own_completions(trainer, completions, len(prompt_ids))
                masks = [
                    decode_vllm_mask(getattr(each.sampling_mask, "token_ids", None), len(each.token_ids), sample)
                    for sample, each in enumerate(completions)
                ]
                return Turn(prompt_ids, completion_ids, [], masks=masks)

            yield make_turn
        return
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    by_engine = kept_by_batches if trainer.use_transformers_continuous_batching else kept_by_generate
    with by_engine(model, trainer.temperature) as kept:
        yield kept.turn


def masks_of_func(masks: Sequence[SamplingMask] | None, prompt_ids: Prompts, completion_ids: Prompts) -> RolloutRecord:
    """
    Check the masks that a `rollout_func` returned.

    Args:
        masks (sequence of [`SamplingMask`], *optional*):
            Its field `sampling_masks`: one a sample.
        prompt_ids, completion_ids (sequence of `list[int]`):
            Tokens of each sample.

    Returns:
        [`RolloutRecord`].

    Raises:
        `ValueError`: If there are no masks, or one of them does not belong to its tokens; it names the sample.
    """
    if masks is None:
        raise ValueError(
            "`rollout_func` returned no `sampling_masks`. Return a list with one `SamplingMask` a sample; "
            "`trainer.rollout_turn` records them and `stitch` joins them. Or set `use_sampling_mask_replay=False`."
        )
    if len(masks) != len(prompt_ids):
        raise ValueError(
            f"`rollout_func` returned `sampling_masks` of {len(masks)} samples for {len(prompt_ids)} prompts. Return "
            "one a sample."
        )
    for sample, (mask, completion) in enumerate(zip(masks, completion_ids, strict=True)):
        if not isinstance(mask, SamplingMask):
            raise ValueError(
                f"sample {sample}: its entry of `sampling_masks` is a {type(mask).__name__}, expected a SamplingMask. "
                "Make one with `SamplingMask.of(rows)`, one list of kept ids a token."
            )
        mask.check(completion, sample)
    return RolloutRecord([len(ids) for ids in prompt_ids], [torch.empty(0)] * len(masks), None, list(masks))
