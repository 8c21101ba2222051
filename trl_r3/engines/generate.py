"""Transformers' `generate()`, with what it does not return: routes, log-probabilities, and which tokens were kept.

Legend: B sequences (prompts times `num_return_sequences`), P prompt tokens with padding, T tokens of the returned
sequences, L MoE layers, K experts per token, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import find_causal_lm, is_compiled, swapped
from ..records.record import slice_samples
from ..records.sampling_mask import SamplingMask
from ..routers.passes import RecordedRoutes
from ..routers.router_replay import RouterReplay
from ._compat_engines import last_processor
from .fed_tokens import recorded_as_fed
from .sampled_tokens import SampledTokens, drawn_tokens
from .turns import MakeTurn, Prompts, SamplingTrainer, Turn


@dataclass
class Generated:
    """One call of `generate` with what was recorded of it."""

    output: Any  # what `generate` returned
    sequences: Tensor  # (B, T)
    prompt_width: int
    records: Tensor | None  # packed (B, T, L, K), missing where nothing was routed
    logprobs: Tensor | None  # (B, T - P), of the sampled tokens; NaN where `generate` put padding
    kept: list[list[Tensor]] | None  # by completion token, then by sequence: ids that were left to draw from

    def turn(self, prompt_ids: Prompts, completion_ids: Prompts) -> Turn:
        """The turn of these tokens: padding and what follows the end are left out."""
        prompts, completions = [len(ids) for ids in prompt_ids], [len(ids) for ids in completion_ids]
        records: list[Tensor] = []
        if self.records is not None:
            records = slice_samples(self.records.cpu(), self.prompt_width, prompts, completions)
        assert self.logprobs is not None  # they were asked for, by temperature
        logprobs = [values[:count] for values, count in zip(self.logprobs.cpu(), completions, strict=True)]
        masks = None
        if self.kept is not None:
            masks = [SamplingMask.of([at[i] for at in self.kept[:count]]) for i, count in enumerate(completions)]
        return Turn(prompt_ids, completion_ids, records, logprobs, masks)


def generate_with_routes(
    model: nn.Module,
    replay: RouterReplay | None,
    generate: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    temperature: float | None = None,
    keeps: bool = False,
    ends: Sequence[int] | None = None,
) -> Generated:
    """
    Call `generate` and record every forward in it.

    Args:
        model (`torch.nn.Module`):
            The model that generates.
        replay ([`RouterReplay`], *optional*):
            Its handle; `None` to record no routes.
        generate (`Callable`):
            Its own `generate`.
        args, kwargs:
            Arguments for it.
        temperature (`float`, *optional*):
            If given, the log-probabilities of the sampled tokens are returned: of the model's logits divided by it,
            as the trainer scores them.
        keeps (`bool`, *optional*, defaults to `False`):
            Whether to record what the logits processors keep, too. Log-probabilities are over that then, else over the
            whole vocabulary.
        ends (sequence of `int`, *optional*):
            Tokens behind which the sequences will be cut, as in [`~trl_r3.engines.fed_tokens.FedTokens`].

    Returns:
        [`Generated`]: Rows of padding and behind the end of a sequence are missing only where no expert computed them:
        whoever knows the lengths leaves them out.

    Raises:
        `ValueError`: If the way of decoding does not feed every token once, in order.
    """
    check_decoding(model, kwargs)
    lm = find_causal_lm(model)
    sampled = SampledTokens(lm, temperature) if temperature is not None else None
    noted = last_processor(lm, sampled.keep) if keeps and sampled is not None else nullcontext()
    recording: Any = nullcontext() if replay is None else replay.record()
    if replay is not None and replay.padding is not None:
        recording = recorded_as_fed(lm, replay, ends)
    try:
        with noted, recording as recorded:
            output = generate(*args, **recordable_kwargs(kwargs))
    finally:
        if sampled is not None:
            sampled.remove()
    sequences = output if torch.is_tensor(output) else output.sequences
    width = next(ids for ids in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if ids is not None).shape[1]
    records = None
    if replay is not None and recorded is not None:
        _check_fed(recorded, sequences, width)
        rows = recorded.packed[:, : sequences.shape[1] - 1]
        records = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, 1), value=replay.layout.missing)
    logprobs = kept = None
    if sampled is not None:
        drawn_BC = drawn_tokens(sequences[:, width:], end_tokens(model, kwargs))
        logprobs = sampled.logprobs(sequences, drawn_BC)
        kept = sampled.kept_at(sequences, drawn_BC) if keeps else None
    return Generated(output, sequences, width, records, logprobs, kept)


def _check_fed(recorded: RecordedRoutes, sequences: Tensor, width: int) -> None:
    """
    Refuse routes of other tokens than those returned. Forwards beyond the end do no harm: `generate` may stop late.
    """
    if not recorded.forwards:
        raise RuntimeError(
            "`generate` returned without a forward of the model, so there is nothing to record: something else made "
            "its sequences. Let the model generate them, or set `use_routing_replay=False`."
        )
    num_rows, fed = sequences.shape[1] - 1, sum(forward.shape[1] for forward in recorded.forwards)
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


@contextmanager
def recorded_generate(trainer: SamplingTrainer, replay: RouterReplay | None, masks: bool) -> Iterator[MakeTurn]:
    """
    Record one call of `trainer._generate_single_turn`, by `generate`.

    Args:
        trainer ([`SamplingTrainer`]):
            The trainer.
        replay ([`RouterReplay`], *optional*):
            Handle on its policy; `None` to record no routes.
        masks (`bool`):
            Whether to record sampling masks.

    Yields:
        What makes the [`Turn`] once the call has returned.
    """
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    own_generate, calls = model.generate, []
    ends = getattr(trainer, "eos_token_ids", None)  # IW-OPD has none: it cuts off padding, whatever comes before

    def generate(*args, **kwargs):
        calls.append(
            generate_with_routes(
                model, replay, own_generate, args, kwargs, temperature=trainer.temperature, keeps=masks, ends=ends
            )
        )
        return calls[-1].output

    def make_turn(prompt_ids: Prompts, completion_ids: Prompts) -> Turn:
        (generated,) = calls
        return generated.turn(prompt_ids, completion_ids)

    with swapped(model, "generate", generate):
        yield make_turn


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
    """A generation setting as `generate` resolves it: argument, `None` too, then given config, then the model's."""
    if name in kwargs:
        return kwargs[name]
    value = getattr(kwargs.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if value is None else value


def end_tokens(model: Any, kwargs: dict[str, Any]) -> list[int]:
    """The tokens that end a sequence of `generate`, which goes on with padding."""
    ends = setting(model, kwargs, "eos_token_id")
    return [] if ends is None else [int(end) for end in torch.as_tensor(ends).flatten()]


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
