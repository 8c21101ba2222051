"""Quirks of what trainers train with, one function each, with the condition under which it can go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .._compat import swapped, warn
from ..engines.generate import end_tokens

_BESIDE_TOKENS = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles"),
    *("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
)


@contextmanager
def attending_plainly(model: nn.Module) -> Iterator[None]:
    """
    Let a model attend without what the packed rows of TRL's AsyncGRPO tell its attention. Goes when that attention
    takes a batch without them.
    """
    configs: dict[int, Any] = {id(each.config): each.config for each in model.modules() if hasattr(each, "config")}
    own = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in own:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in own:  # the outermost first: what is set there is set on its parts
            config._attn_implementation = implementation


@contextmanager
def stopping_if_alive(worker: Any) -> Iterator[None]:
    """
    Let `worker.stop()` of TRL's AsyncGRPO end when the rollout process has died. TRL 1.16 then waits for ever to wake
    a thread that died with it. Goes when `stop` looks whether the process lives.
    """
    own = worker.stop

    def stop() -> None:
        if worker._process is not None and not worker._process.is_alive():
            worker._process = None
        own()

    with swapped(worker, "stop", stop):
        yield


def refuse_second_training(has_begun: bool) -> None:
    """
    Say that TRL's AsyncGRPO trains once. TRL 1.16 starts the rollout process and sends the first weights in the first
    training only: a second one takes what is left in the queue, of whatever weights, and then waits for a process that
    is no more. Goes when each training starts one.
    """
    if has_begun:
        raise RuntimeError(
            "`train()` was called on an asynchronous trainer that has begun to train before, but TRL starts 1 rollout "
            "process a trainer, and it has ended: what is left in its queue would be trained, and no more would come. "
            "Construct another trainer, and call its `train(resume_from_checkpoint=...)` to go on."
        )


def beside_tokens(batch: dict[str, Any]) -> dict[str, Any]:
    """
    What TRL gives each forward over a batch beside its tokens: images, and which tokens are theirs. Goes when TRL
    scores a batch as a whole.
    """
    return {name: batch[name] for name in _BESIDE_TOKENS if name in batch}


def warn_of_unknown_ends(trainer: Any) -> None:
    """
    Tell of ends of completions that TRL does not cut at. It cuts at those that model and tokenizer declare, and trains
    on the padding behind others, given in `generation_kwargs`. Goes when TRL cuts at these, too.
    """
    known = getattr(trainer, "eos_token_ids", None)  # IW-OPD cuts padding off
    if known is None:
        return
    unknown = sorted({*end_tokens(trainer.model, {"generation_config": trainer.generation_config})} - {*known})
    if unknown:
        warn(
            f"`generation_kwargs` ends completions at tokens {unknown}, but TRL cuts them at {sorted(known)}, "
            "and trains on padding behind the others. Set `eos_token_id` of the model's `generation_config` instead, "
            "which TRL reads when the trainer is built."
        )
