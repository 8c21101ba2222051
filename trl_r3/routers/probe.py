"""Watch one forward of a few tokens: which modules made top-k calls, and what had been selected where experts ran.

Legend: N tokens of the probe, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from .._compat import execution_device, fetches_weights, forget_forwards, shard_again
from .self_check import UnsupportedRouterError, evaluating
from .top_k import TopKWatch

PROBE_BATCH, PROBE_TOKENS = 2, 9  # no model has 18 experts: a dimension of 18 is that of the tokens


@dataclass
class TopK:
    """A top-k call of a module: which of its calls, over how many columns, and what it selected."""

    module: nn.Module
    call_index: int
    columns: int
    top_k: int
    ids: Tensor

    @property
    def of_tokens(self) -> bool:
        """Whether it selected for each token of the forward."""
        return self.ids.shape[-1] == self.top_k and self.ids.numel() == PROBE_BATCH * PROBE_TOKENS * self.top_k


@dataclass
class Event:
    """A mixture block reached its experts: what it had selected by then."""

    block: str
    selections: list[TopK]
    ids_args: list[Tensor] = field(default_factory=list)  # integer arguments of the experts


@dataclass
class WatchedForward:
    """What one forward did."""

    topks: list[TopK] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    outputs: dict[nn.Module, list[Any]] = field(default_factory=dict)  # of the modules that made a top-k
    entered: set[nn.Module] = field(default_factory=set)


def probe(
    model: nn.Module, names: dict, experts: dict, embed: Callable[[Tensor], Tensor] | None = None
) -> WatchedForward:
    """Run one forward and note every top-k, the module that made it, and every arrival at a block's experts."""
    watched, stack, counts = WatchedForward(), [], []
    seen = 0

    def enter(module: nn.Module, args: tuple) -> None:
        nonlocal seen
        if module in experts:
            watched.events.append(Event(experts[module], watched.topks[seen:]))
            seen = len(watched.topks)
        watched.entered.add(module)
        stack.append(module)
        counts.append(0)

    def given(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tensors = filter(torch.is_tensor, (*args, *kwargs.values()))
        watched.events[-1].ids_args += [each.detach().clone() for each in tensors if not each.is_floating_point()]

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        stack.pop()
        if counts.pop():
            watched.outputs.setdefault(module, []).append(output)

    def on_topk(call, args, kwargs):
        result = torch.topk(*args, **kwargs)
        if stack and call.scores.is_floating_point():
            watched.topks.append(TopK(stack[-1], counts[-1], call.columns, call.top_k, result[1]))
            counts[-1] += 1
        return result

    # hooks of the models own classes run too; ours only watch
    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    handles += [module.register_forward_pre_hook(given, with_kwargs=True) for module in experts]
    try:
        with evaluating(model), TopKWatch(on_topk):
            run_probe(model, embed)
    finally:
        for handle in handles:
            handle.remove()
    return watched


def run_probe(model: nn.Module, embed: Callable[[Tensor], Tensor] | None = None, another_second: bool = False) -> None:
    """Score two short sequences, of which the second has other tokens with `another_second`."""
    embedding = embedding_of(model)
    device = input_device(model)
    if device is None:
        weight = next(embedding.parameters(recurse=False))
        raise UnsupportedRouterError(
            f"the weights of {type(model).__name__} are not on this process (device {weight.device}, "
            f"{weight.numel()} elements of the embedding) and no hook fetches them, so its routers cannot be checked. "
            "Attach after they are loaded; where they are sharded, after `accelerator.prepare`."
        )
    vocab = model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
    ids = (torch.arange(PROBE_BATCH * PROBE_TOKENS, device=device) * 7 + 3) % vocab
    ids = ids.reshape(PROBE_BATCH, PROBE_TOKENS)
    if another_second:
        ids[1] = (ids[1] + 1) % vocab
    handle = None
    if embed is not None:
        handle = embedding.register_forward_hook(lambda module, args, output: embed(output))
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        if handle is not None:
            handle.remove()
        shard_again(model)
        forget_forwards(model)


def input_device(model: nn.Module) -> torch.device | None:
    """
    Where token ids have to be, or `None` where a forward would find no weights.

    Weights that are on the meta device or empty may be fetched when they are needed: by hooks (ZeRO-3) or by a forward
    that was put in place of the module's own (offloading).
    """
    embedding = embedding_of(model)
    weight = next(embedding.parameters(recurse=False))
    if not weight.is_meta and weight.numel() > 0:
        return weight.device
    if not fetches_weights(embedding):
        return None
    return execution_device(embedding) or (torch.device("cpu") if weight.is_meta else weight.device)


def embedding_of(model: nn.Module) -> nn.Module:
    """The module that holds the weight of the embedding: that of an adapter only wraps it."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return next(module for module in embedding.modules() if next(module.parameters(recurse=False), None) is not None)


def noise_like(hidden: Tensor) -> Tensor:
    """Other hidden states of the same size, for the same tokens."""
    generator = torch.Generator(hidden.device).manual_seed(0)  # the global one belongs to the user
    noise = torch.randn(hidden.shape, generator=generator, device=hidden.device, dtype=torch.float32)
    return (noise * hidden.float().std() * 3).to(hidden.dtype)
