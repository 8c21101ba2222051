"""How `generate()` decodes: its settings, what can be recorded, which positions it fed.

Legend: B sequences, P prompt tokens with padding, T tokens of the returned sequences.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import is_compiled


def recordable_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Arguments of `generate` with which every forward is seen, and feeds each token once: a static cache would compile
    the forward, and a `Trainer` switches the cache off in the model's config.
    """
    if kwargs.get("generation_config") is None:
        return {"use_cache": True, **kwargs, "disable_compile": True}
    config = copy.copy(kwargs["generation_config"])
    config.disable_compile, config.use_cache = True, True
    return {**kwargs, "generation_config": config}


def setting(model: Any, kwargs: dict[str, Any], name: str) -> Any:
    """A generation setting as `generate` resolves it: argument, then given config, then the model's."""
    for value in (kwargs.get(name), getattr(kwargs.get("generation_config"), name, None)):
        if value is not None:
            return value
    return getattr(model.generation_config, name, None)


def check_decoding(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """
    Refuse ways of decoding that reorder, reject or repeat tokens between forwards.

    Args:
        model (`torch.nn.Module`):
            The model that generates.
        kwargs (`dict[str, Any]`):
            Arguments of `generate`.

    Raises:
        `ValueError`: Naming the argument, the reason and what to set instead.
    """

    def refuse(what: str, reason: str, remedy: str) -> None:
        raise ValueError(f"a rollout cannot be recorded with {what}: {reason}. Set {remedy} instead.")

    if (setting(model, kwargs, "num_beams") or 1) > 1:
        beams = setting(model, kwargs, "num_beams")
        refuse(f"`num_beams={beams}`", "beam search reorders sequences between forwards", "`num_beams=1`")
    drafts = any(
        setting(model, kwargs, name) for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
    )
    if drafts or kwargs.get("assistant_model") is not None:
        refuse(
            "assisted decoding",
            "it feeds draft tokens and rejects some of them",
            "`assistant_model`, `prompt_lookup_num_tokens`, `assistant_early_exit` and `use_mtp` to None",
        )
    if (setting(model, kwargs, "guidance_scale") or 1) != 1:
        scale = setting(model, kwargs, "guidance_scale")
        refuse(f"`guidance_scale={scale}`", "it also feeds a second, unconditional stream", "`guidance_scale=None`")
    if False in (kwargs.get("use_cache"), getattr(kwargs.get("generation_config"), "use_cache", None)):
        refuse("`use_cache=False`", "every forward routes all tokens again", "`use_cache=True`")
    if kwargs.get("custom_generate") is not None:
        refuse("`custom_generate`", "its forwards are unknown", "`custom_generate=None`")
    if setting(model, kwargs, "cache_implementation") == "paged":
        refuse("`cache_implementation='paged'`", "it batches requests continuously", "`cache_implementation=None`")
    if kwargs.get("inputs_embeds") is not None:
        refuse("`inputs_embeds`", "the returned sequences lack the prompt", "`input_ids`")
    if is_compiled(model):
        refuse("a compiled model", "it runs past the capture", "no `torch.compile`")


def prompt_mask(model: Any, prompt: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """(prompts, P) of `bool`: given, or inferred from padding by the rule that `generate` documents."""
    if kwargs.get("attention_mask") is not None:
        return kwargs["attention_mask"].bool()
    pad, ends = setting(model, kwargs, "pad_token_id"), _end_tokens(model, kwargs)
    return prompt != pad if pad is not None and pad not in ends else torch.ones_like(prompt, dtype=torch.bool)


def _end_tokens(model: Any, kwargs: dict[str, Any]) -> list[int]:
    ends = setting(model, kwargs, "eos_token_id")
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def routed_positions(model: Any, sequences: Tensor, width: int, prompt_mask: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """(B, T) of `bool`: real tokens of each sequence, but for its last one, which was sampled and not fed."""
    repeats = sequences.shape[0] // prompt_mask.shape[0]
    completion, ends = sequences[:, width:], _end_tokens(model, kwargs)
    real = torch.ones_like(completion, dtype=torch.bool)
    if ends and completion.shape[1]:
        is_end = torch.isin(completion, torch.tensor(ends, device=completion.device))
        real = is_end.int().cumsum(1) - is_end.int() == 0
        pad = setting(model, kwargs, "pad_token_id")
        stops = kwargs.get("stopping_criteria") or any(setting(model, kwargs, s) for s in ("stop_strings", "max_time"))
        if stops and pad is not None and pad not in ends:  # what these end is filled up with padding
            real &= (completion != pad).flip(1).int().cummax(1).values.flip(1).bool()
    prompt = prompt_mask.repeat_interleave(repeats, 0).to(sequences.device)
    real_BT = torch.cat([prompt, real], dim=1)
    last = real_BT.shape[1] - 1 - real_BT.int().flip(1).argmax(1)
    return real_BT.scatter(1, last[:, None], False)
