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
from ..records.checks import check_fed
from ..records.metrics import drawn_logprobs
from ..records.record import slice_samples
from ..records.sampling_mask import SamplingMask, kept_rows
from ..routers.router_replay import RouterReplay
from ._compat_engines import last_processor
from .fed_tokens import recorded_as_fed
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


class SampledTokens:
    """
    What `generate()` sampled: log-probabilities, kept as (B,) a step (storing logits would take (B, T, V)), and, where
    its last logits processor is [`SampledTokens.keep`], the ids that were left to draw from.
    """

    def __init__(self, lm: nn.Module, temperature: float):
        self.temperature = temperature
        self.logits: Tensor | None = None  # (B, V) of the last position so far, -inf where it was cut
        self.position = 0  # tokens that have been fed
        self.values: dict[int, Tensor] = {}  # by position of the sampled token
        self.kept: dict[int, list[Tensor]] = {}  # likewise
        self.handles = [
            lm.register_forward_pre_hook(self._before, with_kwargs=True),
            lm.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def keep(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        """Note what can be drawn from scores; they stay as they are."""
        assert self.logits is not None  # of the forward that made the scores
        self.kept[self.position] = kept_rows(scores_BV)
        # not the scores: penalties move them, and the trainer knows none
        self.logits = self.logits.masked_fill(scores_BV == -torch.inf, -torch.inf)
        return scores_BV

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        self._score(ids[:, 0])
        self.position += ids.shape[1]

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.logits = output.logits[:, -1].detach().float() / self.temperature

    def _score(self, token_B: Tensor) -> None:
        if self.logits is not None:
            self.values[self.position] = drawn_logprobs(self.logits, token_B.to(self.logits.device))

    def logprobs(self, sequences: Tensor, drawn_BC: Tensor) -> Tensor:
        """(B, C): one value a completion token, NaN where it was not drawn."""
        if self.position == sequences.shape[1] - 1:
            self._score(sequences[:, -1])
        width = sequences.shape[1] - drawn_BC.shape[1]
        values = [self.values[position] for position in range(width, sequences.shape[1])]
        scored_BC = (
            torch.stack(values, dim=1) if values else torch.empty(len(sequences), 0, dtype=torch.float32, device="cpu")
        )
        return scored_BC.masked_fill(~drawn_BC.to(scored_BC.device), torch.nan)

    def kept_at(self, sequences: Tensor, drawn_BC: Tensor) -> list[list[Tensor]]:
        """By completion token, then by sequence; nothing where it was not drawn."""
        positions = range(sequences.shape[1] - drawn_BC.shape[1], sequences.shape[1])
        lacking = [position for position in positions if position not in self.kept]
        if lacking:
            raise RuntimeError(
                f"`generate` returned {len(positions)} tokens, but its logits processors ran for "
                f"{len(positions) - len(lacking)} of them: something else drew the others. Set "
                "`use_sampling_mask_replay=False`."
            )
        return [
            [ids if is_drawn else ids[:0] for ids, is_drawn in zip(self.kept[position], drawn_B, strict=True)]
            for position, drawn_B in zip(positions, drawn_BC.T.tolist(), strict=True)
        ]


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
        check_fed(recorded.forwards, recorded.tokens, sequences, width)
        rows = recorded.packed[:, : sequences.shape[1] - 1]
        records = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, 1), value=replay.layout.missing)
    logprobs = kept = None
    if sampled is not None:
        drawn_BC = drawn_tokens(sequences[:, width:], end_tokens(model, kwargs))
        logprobs = sampled.logprobs(sequences, drawn_BC)
        kept = sampled.kept_at(sequences, drawn_BC) if keeps else None
    return Generated(output, sequences, width, records, logprobs, kept)


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
    return [] if ends is None else [int(end) for end in torch.as_tensor(ends, device="cpu").flatten()]


def drawn_tokens(completions_BC: Tensor, ends: Sequence[int]) -> Tensor:
    """(B, C) of `bool`: the tokens of completions up to the first end; behind it `generate` puts padding."""
    is_end_BC = torch.isin(completions_BC, torch.tensor(list(ends), dtype=torch.int64, device=completions_BC.device))
    return is_end_BC.int().cumsum(1) - is_end_BC.int() == 0


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
    beams, scale = setting(model, kwargs, "num_beams") or 1, setting(model, kwargs, "guidance_scale") or 1
    drafting = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
    drafts = kwargs.get("assistant_model") is not None or any(setting(model, kwargs, name) for name in drafting)
    drafts_off = "`assistant_model`, `prompt_lookup_num_tokens`, `assistant_early_exit` and `use_mtp` to None"
    uncached = False in (kwargs.get("use_cache"), getattr(kwargs.get("generation_config"), "use_cache", None))
    paged = setting(model, kwargs, "cache_implementation") == "paged"
    custom, embeds = (kwargs.get(name) is not None for name in ("custom_generate", "inputs_embeds"))
    for applies, what, reason, remedy in (
        (beams > 1, f"`num_beams={beams}`", "beam search reorders sequences between forwards", "`num_beams=1`"),
        (drafts, "assisted decoding", "it feeds draft tokens and rejects some of them", drafts_off),
        (
            scale != 1,
            f"`guidance_scale={scale}`",
            "it also feeds a second, unconditional stream",
            "`guidance_scale=None`",
        ),
        (uncached, "`use_cache=False`", "every forward routes all tokens again", "`use_cache=True`"),
        (custom, "`custom_generate`", "its forwards are unknown", "`custom_generate=None`"),
        (paged, "`cache_implementation='paged'`", "it batches requests continuously", "`cache_implementation=None`"),
        (embeds, "`inputs_embeds`", "the returned sequences lack the prompt", "`input_ids`"),
        (is_compiled(model), "a compiled model", "it runs past the capture", "no `torch.compile`"),
    ):
        if applies:
            raise ValueError(f"a rollout cannot be recorded with {what}: {reason}. Set {remedy} instead.")
