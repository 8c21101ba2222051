"""What a user's `rollout_func` returned: records and masks of whole samples, checked.

Legend: T tokens of a sequence, S layer slots (MoE layers, or decoder layers), K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..records.record import RoutingLayout, to_record
from ..records.sampling_mask import SamplingMask
from .turns import Prompts, Turn, stitch


def records_from_func(
    routes: Sequence[np.ndarray | Tensor] | None, prompt_ids: Prompts, completion_ids: Prompts, layout: RoutingLayout
) -> list[Tensor]:
    """
    Check the records that a `rollout_func` returned.

    Args:
        routes (sequence of `numpy.ndarray` or `torch.Tensor` of shape `(T_i - 1, S, K)`, *optional*):
            Its field `routed_experts`: one array a sample.
        prompt_ids, completion_ids (sequence of `list[int]`):
            Tokens of each sample.
        layout ([`RoutingLayout`]):
            Layers and experts of the model.

    Returns:
        list of `torch.Tensor`: Packed records.

    Raises:
        `ValueError`: If there are no records, or one of them does not belong to its tokens; it names the sample.
    """
    if routes is None:
        raise ValueError(
            "`rollout_func` returned no `routed_experts`. Return a list with one array of (prompt + completion - 1, "
            "layers, top_k) expert ids a sample; `trainer.rollout_turn` records them. Or set "
            "`use_routing_replay=False`."
        )
    if len(routes) != len(prompt_ids):
        raise ValueError(
            f"`rollout_func` returned `routed_experts` of {len(routes)} samples for {len(prompt_ids)} prompts. Return "
            f"one array a sample."
        )
    records = [to_record(ids, layout, sample) for sample, ids in enumerate(routes)]
    return stitch([Turn(prompt_ids, completion_ids, records)], prompt_ids, completion_ids, layout).records


def masks_from_func(masks: Sequence[SamplingMask] | None, completion_ids: Prompts) -> list[SamplingMask]:
    """
    Check the masks that a `rollout_func` returned.

    Args:
        masks (sequence of [`SamplingMask`], *optional*):
            Its field `sampling_masks`: one a sample.
        completion_ids (sequence of `list[int]`):
            Tokens of each completion.

    Returns:
        list of [`SamplingMask`].

    Raises:
        `ValueError`: If there are no masks, or one of them does not belong to its tokens; it names the sample.
    """
    if masks is None:
        raise ValueError(
            "`rollout_func` returned no `sampling_masks`. Return a list with one `SamplingMask` a sample; "
            "`trainer.rollout_turn` records them and `stitch` joins them. Or set `use_sampling_mask_replay=False`."
        )
    if len(masks) != len(completion_ids):
        raise ValueError(
            f"`rollout_func` returned `sampling_masks` of {len(masks)} samples for {len(completion_ids)} prompts. "
            "Return one a sample."
        )
    for sample, (mask, completion) in enumerate(zip(masks, completion_ids, strict=True)):
        if not isinstance(mask, SamplingMask):
            raise ValueError(
                f"sample {sample}: its entry of `sampling_masks` is a {type(mask).__name__}, expected a SamplingMask. "
                "Make one with `SamplingMask.of(rows)`, one list of kept ids a token."
            )
        mask.check(completion, sample)
    return list(masks)
