"""`generate()` that returns the routes of its rollout, and a forward that takes them.

Legend: B sequences (prompts times `num_return_sequences`), P prompt tokens with padding, T tokens of the returned
sequences, L MoE layers, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .decoding import SampledLogProbs, check_decoding, prompt_mask, routed_positions, setting, without_compile
from .replay_data import RecordedRoutes
from .routed_experts import MISSING, RoutingShape, missing_rows
from .router_replay import RouterReplay


def enable_routing_replay(model: nn.Module) -> RouterReplay:
    """
    Let a Transformers model record and replay its routing.

    From now on `model.generate(..., return_dict_in_generate=True, output_routed_experts=True)` returns the expert ids
    of the rollout in `routed_experts`, and `model(..., routed_experts=...)` replays them.

    Args:
        model (`torch.nn.Module`):
            A mixture-of-experts causal LM: bare, inside a `PeftModel`, or prepared by Accelerate.

    Returns:
        [`RouterReplay`]: The handle, for `record()` and `replay()`.

    Raises:
        [`UnsupportedRouterError`]: If the model is dense, or a router cannot be replayed; the message names it.
        `ValueError`: If the model is compiled or already enabled.

    Example:

    ```python
    >>> replay = enable_routing_replay(model)
    >>> out = model.generate(**inputs, return_dict_in_generate=True, output_routed_experts=True)
    >>> out.routed_experts.shape  # (B, T, num_moe_layers, K), T = out.sequences.size(1)
    >>> loss = model(out.sequences, labels=labels, routed_experts=out.routed_experts).loss
    >>> disable_routing_replay(model)
    ```
    """
    replay = RouterReplay(model)
    # every wrapper of the model contains this module
    replay.stack._routing_replay = _Surface(model, replay)  # type: ignore[assignment]
    return replay


def disable_routing_replay(model: nn.Module) -> None:
    """
    Undo [`enable_routing_replay`]: the model is bit for bit what it was.

    Args:
        model (`torch.nn.Module`):
            The model that was enabled, bare or in whatever wrapper.

    Raises:
        `ValueError`: If it was not.
    """
    stack = next((module for module in model.modules() if "_routing_replay" in module.__dict__), None)
    if stack is None:
        raise ValueError(
            f"{type(model).__name__} has no routing replay to disable: `enable_routing_replay` was not called on it, "
            "or it was disabled before."
        )
    surface = stack.__dict__.pop("_routing_replay")
    surface.remove()


class _Surface:
    """
    What a user of an enabled model touches: `forward(routed_experts=...)` and `generate(output_routed_experts=True)`.
    """

    def __init__(self, model: nn.Module, replay: RouterReplay):
        self.model = model
        self.replay = replay
        self.own_generate = model.__dict__.get("generate")
        self.context: Any = None
        self.handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        model.generate = self.generate  # type: ignore[assignment]

    def remove(self) -> None:
        """Take everything off the model."""
        for handle in self.handles:
            handle.remove()
        if self.own_generate is not None:
            self.model.generate = self.own_generate
        else:
            del self.model.generate
        self.replay.remove()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        routed_experts = kwargs.pop("routed_experts", None)
        if routed_experts is not None:
            batch = self.replay.batch_source(routed_experts)
            _check_loss_rows(batch.record, self.replay.shape, kwargs)
            self.context = self.replay.replay_from(batch)
            self.context.__enter__()
        return args, kwargs

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        context, self.context = self.context, None
        if context is not None:
            # without an output the forward has raised: that shall be seen, not that nothing was replayed
            failed = None if output is not None else RuntimeError("the forward failed")
            context.__exit__(failed and RuntimeError, failed, None)

    def generate(self, *args, output_routed_experts: bool = False, **kwargs):
        """`generate` of the model, plus `output_routed_experts` (`bool`, *optional*, defaults to `False`)."""
        own = self.own_generate or partial(type(self.model).generate, self.model)  # type: ignore[attr-defined]
        if not output_routed_experts:
            return own(*args, **kwargs)
        if not setting(self.model, kwargs, "return_dict_in_generate"):
            raise ValueError(
                "`output_routed_experts=True` returns the routes beside the sequences, but `return_dict_in_generate` "
                "is not set. Set `return_dict_in_generate=True`."
            )
        rollout = generate_with_routes(self.model, self.replay, own, args, kwargs)
        rollout.output["routed_experts"] = rollout.routed_experts
        return rollout.output


def _check_loss_rows(record: Tensor, shape: RoutingShape, kwargs: dict[str, Any]) -> None:
    """Refuse a missing row of a token that a counted prediction attends to: it would come from other experts."""
    labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
    if labels is None or record.shape[:2] != labels.shape:
        return
    attended = torch.ones_like(labels, dtype=torch.bool)
    if torch.is_tensor(mask) and mask.shape == labels.shape:
        attended = mask.bool()
    counted = torch.zeros_like(attended)
    counted[:, :-1] = (labels[:, 1:] != -100) & attended[:, 1:]  # by the row that makes the prediction
    counted &= attended
    missing = missing_rows(record, shape).to(labels.device) & attended
    needed = missing & (_counted_from(counted, kwargs.get("position_ids")) > 0)
    if needed.any():
        sample, position = needed.nonzero()[0].tolist()
        raise ValueError(
            f"sample {sample}: the row of position {position} is missing, one of {int(needed.sum())} such rows, but "
            "the loss counts predictions that depend on it. Pass the rows, or set `labels` to -100 from there on."
        )


def _counted_from(counted: Tensor, position_ids: Tensor | None) -> Tensor:
    """(B, T): how many counted predictions each position may influence: its own and later ones of its document."""
    after = counted.flip(1).cumsum(1).flip(1)
    if not torch.is_tensor(position_ids) or position_ids.ndim != 2 or position_ids.shape[1] != counted.shape[1]:
        return after
    num_tokens = counted.shape[1]
    positions = torch.arange(num_tokens, device=counted.device)
    starts = torch.where(position_ids.expand_as(counted) == 0, positions, num_tokens)  # of packed documents
    first_from = starts.flip(1).cummin(1).values.flip(1)
    next_start = torch.nn.functional.pad(first_from[:, 1:], (0, 1), value=num_tokens)
    return after - torch.nn.functional.pad(after, (0, 1)).gather(1, next_start)


@dataclass
class Rollout:
    """One call of `generate` with its routes."""

    output: Any  # what `generate` returned
    sequences: Tensor  # (B, T)
    prompt_width: int
    routed_experts: Tensor  # (B, T, L, K) int16, -1 where nothing was routed
    logprobs: Tensor | None  # (B, T - P), of the sampled tokens


def generate_with_routes(
    model: nn.Module,
    replay: RouterReplay,
    generate: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    temperature: float | None = None,
    mask_after_end: bool = True,
) -> Rollout:
    """
    Call `generate` and record every forward in it.

    Args:
        model (`torch.nn.Module`):
            The model that generates.
        replay ([`RouterReplay`]):
            Its handle.
        generate (`Callable`):
            Its own `generate`.
        args, kwargs:
            Arguments for it.
        temperature (`float`, *optional*):
            If given, the log-probabilities of the sampled tokens are returned: of the model's logits divided by it,
            before any truncation of the distribution, as the trainer scores them.
        mask_after_end (`bool`, *optional*, defaults to `True`):
            Whether rows of padding and after the end of a sequence are -1. A caller that knows the lengths does
            without.

    Returns:
        [`Rollout`].

    Raises:
        `ValueError`: If the way of decoding does not feed every token once, in order.
    """
    check_decoding(model, kwargs)
    lm = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    sampled = SampledLogProbs(lm, temperature) if temperature is not None else None
    try:
        with replay.record() as recorded:
            output = generate(*args, **without_compile(kwargs))
    finally:
        if sampled is not None:
            sampled.remove()
    sequences = output if torch.is_tensor(output) else output.sequences
    prompt = next(
        a for a in (args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids")) if a is not None
    )
    width = prompt.shape[1]
    _check_fed(recorded, sequences, width)
    routes = recorded.routed_experts[:, : sequences.shape[1] - 1]
    routes = torch.cat([routes, routes.new_full((routes.shape[0], 1, *routes.shape[2:]), MISSING)], dim=1)
    if mask_after_end:
        routed_BT = routed_positions(model, sequences, width, prompt_mask(model, prompt, kwargs), kwargs)
        routes = routes.masked_fill_(~routed_BT[:, :, None, None].to(routes.device), MISSING)
    logprobs = sampled.of(sequences, width) if sampled is not None else None
    return Rollout(output, sequences, width, routes, logprobs)


def _check_fed(recorded: RecordedRoutes, sequences: Tensor, width: int) -> None:
    """
    Refuse routes of other tokens than those returned. Forwards beyond the end do no harm: `generate` may stop late.
    """
    num_rows = sequences.shape[1] - 1
    fed = sum(forward.shape[1] for forward in recorded.forwards)
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
            "prompt, or something else called the model meanwhile. Set `use_cache=True`, pass no `past_key_values`, "
            "disable gradient checkpointing while generating, and use no logits processor that calls the model."
        )
