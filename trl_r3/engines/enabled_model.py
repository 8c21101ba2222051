"""A Transformers model that records and replays by itself: `generate(output_routed_experts=True)` returns the routes
of its rollout, and `forward(routed_experts=...)` takes them.

Legend: B sequences, P prompt tokens with padding, T tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._compat import find_causal_lm, transforms, warn
from ..records.checks import rows_that_matter
from ..records.record import MISSING, RoutingLayout, missing_rows, unpack
from ..records.sources import WholeBatch
from ..routers.lagging import LaggingPass, OlderRouters
from ..routers.patches import Patch
from ..routers.router_replay import RouterReplay
from .generate import drawn_tokens, end_tokens, generate_with_routes, setting


def enable_routing_replay(
    model: nn.Module,
    *,
    gating: str = "auto",
    padding: str = "keep",
    steady_recompute: bool = False,
    lag: int | None = None,
    route_with: Mapping[str, Tensor] | None = None,
) -> RouterReplay:
    """
    Let a Transformers model record and replay its routing.

    From now on `model.generate(..., return_dict_in_generate=True, output_routed_experts=True)` returns the expert ids
    of the rollout in `routed_experts`, and `model(..., routed_experts=...)` replays them. A copy of the model is not
    enabled, and ignores that argument.

    Args:
        model (`torch.nn.Module`):
            A mixture-of-experts causal LM, or a classifier (reward model) of its kind, which has no `generate`: bare,
            inside a `PeftModel`, or prepared by Accelerate.
        gating (`str`, *optional*, defaults to `"auto"`):
            How a recorded selection takes effect: `"intercept"`, `"op"` or `"auto"`, as in [`RouterReplay`].
        padding (`str`, *optional*, defaults to `"keep"`):
            Whether a forward that replays skips padding: `"keep"` or `"auto"`, as in [`RouterReplay`].
        steady_recompute (`bool`, *optional*, defaults to `False`):
            For training without a rollout, with any trainer: every recompute of a gradient checkpoint goes through the
            experts of its own forward. Without it, a router for which two experts score almost the same may select
            differently in the recompute, which crashes backward or gives wrong gradients.
        lag (`int`, *optional*):
            For training without a rollout, too: the selection of each forward that builds a graph is made by router
            weights that are so many optimizer steps old, from the hidden states of now; its recomputes repeat it. 0 is
            plain training, bit for bit. DeepSeek-V4's anticipatory routing (arXiv 2606.19348) is more: there the whole
            model of an earlier step selects, in a forward of its own over data that is fetched ahead.
        route_with (mapping of `str` to `torch.Tensor`, *optional*):
            Older weights of all routers by their names in the model, such as a copy of an earlier
            `model.state_dict()`, of which nothing else is read. They make the selection always, as they are then
            (update them in place for an average over steps, say), or with `lag` while fewer steps were taken, as when
            a run goes on.

    Returns:
        [`RouterReplay`]: The handle, for `record()` and `replay()`.

    Raises:
        [`UnsupportedRouterError`]: If the model is dense, or a router cannot be replayed; the message names it.
        `ValueError`: If the model is compiled or already enabled, or `lag` or `route_with` cannot be of its routers.

    Example:

    ```python
    >>> replay = enable_routing_replay(model)
    >>> out = model.generate(**inputs, return_dict_in_generate=True, output_routed_experts=True)
    >>> out.routed_experts.shape  # (B, T, num_moe_layers, K), T = out.sequences.size(1)
    >>> loss = model(out.sequences, labels=labels, routed_experts=out.routed_experts).loss
    >>> disable_routing_replay(model)
    ```
    """
    replay = RouterReplay(model, gating, padding)
    lags = lag is not None or route_with is not None
    replay.steady_recompute = steady_recompute or lags
    try:
        if lags:
            replay.steady_pass = partial(LaggingPass, older=OlderRouters(replay.routers, lag, route_with))
        lm = find_causal_lm(model)
        if lm is None:
            raise TypeError(f"{type(model).__name__} holds no Transformers model, so it has no `generate` to enable.")
        _EnabledModel(lm, replay)
    except BaseException:
        replay.remove()
        raise
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
    # FSDP2 may have wrapped ours: Trainer registers `generate` as one of its forwards
    own = (
        vars(module)[name] for module in model.modules() for name in ("generate", "forward") if name in vars(module)
    )
    bare = (getattr(method, "__func__", method) for method in map(inspect.unwrap, own))
    patches = (patch for patch in bare if isinstance(patch, Patch))
    owners = (getattr(patch.around, "__self__", None) for patch in patches)
    enabled = next((owner for owner in owners if isinstance(owner, _EnabledModel)), None)
    if enabled is None:
        raise ValueError(
            f"{type(model).__name__} has no routing replay to disable: `enable_routing_replay` was not called on it, "
            "or it was disabled before."
        )
    enabled.remove()


class _EnabledModel:
    """The two methods that a user of an enabled model calls."""

    def __init__(self, lm: PreTrainedModel, replay: RouterReplay):
        self.lm = lm
        self.replay = replay
        self.noticed = False
        self.patches = [Patch(lm, self._forward, parameter="routed_experts")]
        if hasattr(lm, "generate"):  # a reward model has none
            self.patches.append(Patch(lm, self._generate, name="generate", parameter="output_routed_experts"))

    def remove(self) -> None:
        """Take everything off the model."""
        for patch in self.patches:
            patch.remove()
        self.replay.remove()

    def _forward(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        routed_experts = kwargs.pop("routed_experts", None)
        given = {**dict(zip(self.patches[0].__signature__.parameters, args, strict=False)), **kwargs}
        if routed_experts is None:
            self._notice_live_loss(given)
            return forward(*args, **kwargs)
        if kinds := transforms():
            raise RuntimeError(
                f"`routed_experts` inside a transform of `torch.func` ({', '.join(kinds).lower()}), where it cannot "
                "be read. Call the transform inside `with replay.replay(routed_experts):`, `replay` being the handle "
                "that `enable_routing_replay` returned, with a record of the batch that a forward sees."
            )
        batch = WholeBatch.of(routed_experts, self.replay.layout)
        _check_missing(batch.record, self.replay.layout, given)
        with self.replay.replay_from(batch):
            return forward(*args, **kwargs)

    def _notice_live_loss(self, kwargs: dict[str, Any]) -> None:
        if self.replay.steady_recompute:  # live is what was asked for
            return
        if not self.noticed and kwargs.get("labels") is not None and torch.is_grad_enabled():
            self.noticed = True
            warn(
                "a loss is computed with live routing, on a model that was enabled to replay: no `routed_experts` "
                "came with its labels. If the data has them, the trainer or its collator has dropped the column: set "
                "`remove_unused_columns=False` and pass a `data_collator` that keeps it. Otherwise disable replay "
                "while training."
            )

    def _generate(self, generate: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        wanted = setting(self.lm, kwargs, "output_routed_experts")
        kwargs.pop("output_routed_experts", None)
        if not wanted:
            return generate(*args, **kwargs)
        if not setting(self.lm, kwargs, "return_dict_in_generate"):
            raise ValueError(
                "`output_routed_experts=True` returns the routes beside the sequences, but `return_dict_in_generate` "
                "is not set. Set `return_dict_in_generate=True`."
            )
        ends = end_tokens(self.lm, kwargs)
        generated = generate_with_routes(self.lm, self.replay, generate, args, kwargs, ends=ends)
        assert generated.records is not None  # of the handle
        routed_BT = _routed_positions(self.lm, generated.sequences, generated.prompt_width, args, kwargs)
        ids = unpack(generated.records, self.replay.layout)
        there = routed_BT[:, :, None, None].to(ids.device)
        generated.output["routed_experts"] = ids.masked_fill_(~there, MISSING)
        return generated.output


def _check_missing(record: Tensor, layout: RoutingLayout, kwargs: dict[str, Any]) -> None:
    """Refuse a missing row that a counted prediction depends on: it would come from other experts."""
    labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
    if labels is None or record.shape[:2] != labels.shape:
        return
    attended = torch.ones_like(labels, dtype=torch.bool)
    if torch.is_tensor(mask) and mask.shape == labels.shape:
        attended = mask.bool()
    predicts = torch.zeros_like(attended)
    predicts[:, :-1] = (labels[:, 1:] != -100) & attended[:, 1:]
    needed = rows_that_matter(predicts & attended, kwargs.get("position_ids"))
    missing = missing_rows(record, layout).to(labels.device) & attended & needed
    if missing.any():
        sample, position = missing.nonzero()[0].tolist()
        raise ValueError(
            f"sample {sample}: the row of position {position} is missing, one of {int(missing.sum())} such rows, but "
            "the loss counts predictions that depend on it. Pass the rows, or set `labels` to -100 from there on."
        )


def _prompt_mask(model: Any, prompt: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """(prompts, P) of `bool`: given, or inferred from padding by the rule that `generate` documents."""
    if kwargs.get("attention_mask") is not None:
        return kwargs["attention_mask"].bool()
    pad, ends = setting(model, kwargs, "pad_token_id"), end_tokens(model, kwargs)
    return prompt != pad if pad is not None and pad not in ends else torch.ones_like(prompt, dtype=torch.bool)


def _routed_positions(model: Any, sequences: Tensor, width: int, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """(B, T) of `bool`: real tokens of each sequence, but for its last one, which was sampled and not fed."""
    prompts = (args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids"))
    mask = _prompt_mask(model, next(prompt for prompt in prompts if prompt is not None), kwargs)
    completion, ends = sequences[:, width:], end_tokens(model, kwargs)
    real = drawn_tokens(completion, ends)
    if ends and completion.shape[1]:
        pad = setting(model, kwargs, "pad_token_id")
        stops = kwargs.get("stopping_criteria") or any(setting(model, kwargs, s) for s in ("stop_strings", "max_time"))
        if stops and pad is not None and pad not in ends:  # what these end is filled up with padding
            real &= (completion != pad).flip(1).int().cummax(1).values.flip(1).bool()
    prompt = mask.repeat_interleave(sequences.shape[0] // mask.shape[0], 0).to(sequences.device)
    real_BT = torch.cat([prompt, real], dim=1)
    last = real_BT.shape[1] - 1 - real_BT.int().flip(1).argmax(1)
    return real_BT.scatter(1, last[:, None], False)
