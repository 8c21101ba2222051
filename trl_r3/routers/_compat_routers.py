"""Quirks of libraries inside a decoder, one function each, with the condition under which it can go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_OF_SHAPE = {
    "transformers.integrations.neftune.neftune_post_forward_hook",  # its noise shrinks with the width
    "peft.tuners.lora.model._alora_offsets_pre_forward_hook",  # counts tokens from the last column
    # one name a row
    *(f"peft.tuners.{tuner}.model._adapter_names_pre_forward_hook" for tuner in ("lora", "road", "glora", "hira")),
}


def depends_on_shape(hook: Any) -> bool:
    """
    Whether a forward hook of Transformers or PEFT computes with the rows and columns of the batch that a model was
    given, so that without padding it would compute something else. Goes when these are told which tokens are real.
    """
    return f"{getattr(hook, '__module__', '')}.{getattr(hook, '__qualname__', '')}" in _OF_SHAPE


def attention_of(stack: nn.Module) -> str | None:
    """The name of the attention that a Transformers model runs. Goes when Transformers has a public way to ask."""
    return getattr(getattr(stack, "config", None), "_attn_implementation", None)


def rope_by_length(stack: nn.Module) -> str | None:
    """
    The kind of rotary embedding, if it depends on the last position of a batch. Goes when Transformers has a public
    way to ask.
    """
    parameters = getattr(getattr(stack, "config", None), "rope_parameters", None) or {}
    kinds = [each.get("rope_type") for each in (parameters, *parameters.values()) if isinstance(each, dict)]
    return next((kind for kind in kinds if kind is not None and ("dynamic" in kind or kind == "longrope")), None)


@contextmanager
def forwards_alone(model: nn.Module) -> Iterator[None]:
    """
    Let a model in evaluation mode run several forwards without a backward. PEFT's activated LoRA hooks layers that are
    set to be checkpointed in each forward, also where nothing is, takes the hooks off in a backward, and calls another
    forward before it an error. Goes when it does so in training mode only.
    """
    layers: list[Any] = [layer for layer in model.modules() if vars(layer).get("gradient_checkpointing") is True]
    try:
        for layer in layers:
            layer.gradient_checkpointing = False
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
