"""What of a forward's arguments, or of the config where they say nothing, speaks against packing it."""

from __future__ import annotations

from typing import Any

import torch

_OF_TOKENS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")  # what is packed
_CACHES = ("cache", "past_key_values")  # its name from Transformers 5.24 on, and before


def _is_of(value: Any, size: torch.Size) -> bool:
    return torch.is_tensor(value) and value.ndim > 1 and value.shape[:2] == size


def why_padded(args: tuple, kwargs: dict[str, Any], config: Any = None) -> str | None:
    """Why a forward of the module with this config is not packed; `None` where nothing speaks against it."""

    def asked_for(name: str) -> Any:
        value = kwargs.get(name)
        return getattr(config, name, None) if value is None else value

    mask, ids, positions = kwargs.get("attention_mask"), kwargs.get("input_ids"), kwargs.get("position_ids")
    embeds = kwargs.get("inputs_embeds")
    given = ids if embeds is None else embeds
    if args or not torch.is_tensor(given) or given.ndim != (2 if embeds is None else 3):
        return "it is not given `input_ids` or `inputs_embeds` by name"
    if not torch.is_tensor(mask) or mask.shape != given.shape[:2]:
        return "its attention mask is not one of (batch, tokens)"
    if positions is not None and (positions.ndim != 2 or positions.shape[1] != given.shape[1]):
        return "its position ids are not those of (batch, tokens)"
    beside = [name for name, value in kwargs.items() if name not in _OF_TOKENS and _is_of(value, given.shape[:2])]
    if beside:
        return f"it is given {', '.join(beside)} of (batch, tokens)"
    asked = [name for name in ("output_hidden_states", "output_attentions") if asked_for(name)]
    asked += ["use_cache"] if kwargs.get("use_cache") else []  # a config asks for one by default
    asked += ["a tuple"] if asked_for("return_dict") is False else []
    if asked or any(kwargs.get(name) is not None for name in _CACHES):
        return f"it is asked for {', '.join(asked) or 'a cache'}"
    return None
