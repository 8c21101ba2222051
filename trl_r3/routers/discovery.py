"""Find the routers of a model by watching one forward of a few tokens, and check that each can be replayed.

Legend: N tokens of the probe, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import uses_kernels
from ..gating import native_kernels
from ..records.record import RoutingLayout
from .gated import GatedRouter, GateFormula, with_gating_op
from .patches import Patch
from .probe import PROBE_BATCH, PROBE_TOKENS, Event, WatchedForward, noise_like, probe, run_probe
from .router import Router
from .selecting import check_order, inside_of, selecting
from .self_check import (
    UnsupportedRouterError,
    check_masks,
    check_router,
    evaluating,
    rebound_forward,
    refusal,
    same_ids,
)


@dataclass
class FoundRouters:
    """
    What [`find_routers`] found.

    Args:
        routers (list of [`Router`]):
            By ascending decoder layer, each checked.
        stack (`torch.nn.Module`):
            The module that owns the decoder layers.
        num_decoder_layers (`int`):
            How many these are.
    """

    routers: list[Router]
    stack: nn.Module
    num_decoder_layers: int

    @property
    def layout(self) -> RoutingLayout:
        """Layers and experts of the model."""
        first, layers = self.routers[0], tuple(router.layer for router in self.routers)
        return RoutingLayout(layers, self.num_decoder_layers, first.num_experts, first.top_k)


def find_routers(model: nn.Module, gating: str = "auto") -> FoundRouters:
    """
    Find the routers of a mixture-of-experts causal LM and check each on its real weights.

    The model scores a few tokens twice, in evaluation mode. The first forward is watched: a router is the module
    whose top-k call selects the ids that the experts of its block are given; its place is the decoder-layer index in
    its module path. In the second forward, whose second sequence has other tokens, each router is checked inside its
    own call, where sharded weights are gathered.

    Args:
        model (`torch.nn.Module`):
            A Transformers model, bare or inside a `PeftModel`.
        gating (`str`, *optional*, defaults to `"auto"`):
            As in [`RouterReplay`].

    Returns:
        [`FoundRouters`].

    Raises:
        [`UnsupportedRouterError`]: If the model is dense, or one of its routers cannot be replayed.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedRouterError(f"{type(model).__name__} is an encoder-decoder. Replay needs a causal LM.")
    names = {module: name for name, module in model.named_modules()}
    experts = {module: name.rpartition(".")[0] for name, module in model.named_modules() if is_experts(name)}
    watched = probe(model, names, experts)
    if not watched.events:
        _refuse_without_events(model, names, experts, watched)
    path, stack = _decoder_stack(model, [event.block for event in watched.events])
    found = [
        _router_of(event, names, watched)
        for event in watched.events
        if not _is_static(event, model, names, experts, watched)
    ]
    _refuse_what_is_beside(model, experts, watched)
    found.sort(key=lambda pair: pair[0].layer)
    _check_uniform(model, [router for router, _ in found])
    return FoundRouters(_checked(model, found, gating), model.get_submodule(path), len(stack))  # type: ignore[arg-type]


def _checked(model: nn.Module, found: list[tuple[Router, Tensor]], gating: str) -> list[Router]:
    """Run a second forward in which each router is checked, and given its op; with what it selected in the first."""
    routers = [router for router, _ in found]
    checked: dict[int, Router] = {}
    errors: list[Exception] = []

    def check(index: int, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        try:
            router = replace(routers[index], rebound=rebound_forward(routers[index], forward, args, kwargs))
            router = check_router(router, forward, args, kwargs)
            check_masks(router, forward, args, kwargs)
            check_order(router, found[index][1], forward, args, kwargs)
            previous = checked.get(index - 1)
            likely = previous.formula if isinstance(previous, GatedRouter) else None
            checked[index] = _gated(router, gating, likely, forward, args, kwargs)
        except Exception as error:  # noqa: BLE001
            # raised when the forward is over: with sharded weights, other processes go on to meet this one in it
            errors.append(error)
        return forward(*args, **kwargs)

    patches = [Patch(router.module, check, index) for index, router in enumerate(routers)]
    try:
        with evaluating(model):
            run_probe(model, another_second=True)
    finally:
        for patch in patches:
            patch.remove()
    if errors:
        raise errors[0]
    for index, router in enumerate(routers):
        if index not in checked:
            raise refusal(router, "a second forward did not run it")
    return [checked[index] for index in range(len(routers))]


def _gated(
    router: Router, gating: str, likely: GateFormula | None, forward: Callable, args: tuple, kwargs: dict[str, Any]
) -> Router:
    device = next((value.device.type for value in args if torch.is_tensor(value)), "cpu")
    if gating == "intercept" or (gating == "auto" and device not in native_kernels()):
        return router
    gated = with_gating_op(router, forward, args, kwargs, likely)
    if gated is None and gating == "op":
        remedy = "Set `gating='auto'`, and no `routing_replay_shift_weight`, which needs the op"
        raise refusal(router, f"`masked_topk_gating` does not cover its gate. {remedy}")
    return gated or router


def is_experts(name: str) -> bool:
    """Whether a module of this path holds the experts of a layer."""
    # PEFT wraps the experts for `target_parameters`; the wrapper keeps the name and runs `base_layer`
    return name.rpartition(".")[2] == "experts"


def refuse_dense(model: nn.Module) -> None:
    """
    Refuse a model without experts, whose weights may not be there yet.

    Raises:
        [`UnsupportedRouterError`]: Naming the model.
    """
    if not any(is_experts(name) for name, _ in model.named_modules()):
        raise UnsupportedRouterError(
            f"{type(model).__name__} is a dense model: no module in it is named `experts`. There is no routing to "
            "replay; set `use_routing_replay=False`."
        )


def _refuse_without_events(model: nn.Module, names: dict, experts: dict, watched: WatchedForward) -> None:
    if experts:
        raise UnsupportedRouterError(
            f"{type(model).__name__} has {len(experts)} modules named `experts` "
            f"({next(iter(experts.values()))}.experts), but its forward called none of them{_kernel_hint(model)}. "
            "Replay needs routers that hand their selection to an `experts` module."
        )
    others = sorted({type(topk.module).__name__ for topk in watched.topks})
    if others:
        raise UnsupportedRouterError(
            f"{type(model).__name__} has no module named `experts`, but its forward calls `torch.topk` in "
            f"{', '.join(others)}. Replay needs routers that hand their selection to an `experts` module."
        )
    raise UnsupportedRouterError(
        f"{type(model).__name__} is a dense model: no module in it is named `experts`, and its forward selects "
        "nothing. There is no routing to replay; set `use_routing_replay=False`."
    )


def _kernel_hint(model: nn.Module) -> str:
    return " because `use_kernels=True` fused them" if uses_kernels(model) else ""


def _is_static(event: Event, model: nn.Module, names: dict, experts: dict, watched: WatchedForward) -> bool:
    """Whether a block without a top-k selects by token id alone (hash routing), so that there is nothing to replay."""
    if selecting(event, names) is not None:
        return False
    if event.ids_args:
        # other hidden states, same tokens
        other = probe(model, names, experts, embed=noise_like)
        twins = [twin for twin in other.events if twin.block == event.block]
        if len(twins) == 1 and all(map(torch.equal, event.ids_args, twins[0].ids_args)):
            return True
    block = model.get_submodule(event.block)
    where = f"{event.block} ({type(block).__name__}) of {type(model).__name__}"
    if inside := inside_of(event, names):
        calls = ", ".join(f"{topk.top_k} of {topk.columns} (ids of shape {tuple(topk.ids.shape)})" for topk in inside)
        ids = ", ".join(str(tuple(ids.shape)) for ids in event.ids_args) or "none"
        raise UnsupportedRouterError(
            f"{where} has no `torch.topk` that selects all experts of each token: for {PROBE_BATCH * PROBE_TOKENS} "
            f"tokens its top-k calls select {calls}, and its experts are given ids of shape {ids}. Replay can only "
            "replace one top-k that decides which experts each token goes to."
        )
    if (times := [each.block for each in watched.events].count(event.block)) > 1:
        raise UnsupportedRouterError(
            f"the experts of {where} ran {times} times in one forward, so that layers share the module, and a record "
            "has one slot a layer. Give each layer a module of its own; parameters may be shared."
        )
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in block.named_children())
    raise UnsupportedRouterError(
        f"{where} reaches its experts without a `torch.topk`{_kernel_hint(model)}: its children are {children}. "
        "Replay can only replace a top-k selection."
    )


def _refuse_what_is_beside(model: nn.Module, experts: dict, watched: WatchedForward) -> None:
    """Refuse a model of which a part only would be replayed: other experts ran, which nothing is known of."""
    seen = {event.block for event in watched.events}
    beside = [block for block in experts.values() if block not in seen]
    ran = [block for block in beside if model.get_submodule(block) in watched.entered]
    if ran:
        raise UnsupportedRouterError(
            f"{type(model).__name__} has {len(seen)} mixtures whose `experts` module is called, beside {len(ran)} "
            f"({ran[0]}) whose `experts` module is not called, so they would route live. Replay needs routers that "
            "hand their selection to an `experts` module in all of them."
        )


def _router_of(event: Event, names: dict, watched: WatchedForward) -> tuple[Router, Tensor]:
    """The router of a block, and the (N, K) ids that it selected."""
    topk = selecting(event, names)
    assert topk is not None  # _is_static has raised otherwise
    name, outputs = names[topk.module], watched.outputs[topk.module]
    fired = len(outputs)
    if fired != 1:
        raise UnsupportedRouterError(
            f"{name} ({type(topk.module).__name__}) ran {fired} times in one forward. A record has one slot a layer, "
            "so a router must run once."
        )
    output = outputs[0] if isinstance(outputs[0], tuple) else ()
    ids_output = next((i for i, value in enumerate(output) if same_ids(value, topk.ids)), None)
    layer = _layer_path(name)
    router = Router(name, topk.module, layer[1], topk.columns, topk.top_k, topk.call_index, ids_output)
    return router, topk.ids.reshape(-1, topk.top_k)


def _layer_path(name: str) -> tuple[str, int]:
    """Split a module path at its first index: 'model.layers.3.mlp.gate' -> ('model.layers', 3)."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if index is None:
        raise UnsupportedRouterError(f"router {name} is not inside a numbered decoder layer, so its layer is unknown.")
    return ".".join(parts[:index]), int(parts[index])


def _decoder_stack(model: nn.Module, names: list[str]) -> tuple[str, nn.Module]:
    """Path of the module that owns the decoder layers, and their list."""
    stacks = {_layer_path(name)[0] for name in names}
    if len(stacks) != 1:
        raise UnsupportedRouterError(
            f"{type(model).__name__} has routers in {len(stacks)} stacks of layers ({', '.join(sorted(stacks))}). "
            "Replay needs them in one, the decoder."
        )
    path = stacks.pop()
    return path.rpartition(".")[0], model.get_submodule(path)


def _check_uniform(model: nn.Module, routers: list[Router]) -> None:
    first = routers[0]
    for previous, router in zip(routers, routers[1:], strict=False):
        if router.layer == previous.layer:
            raise UnsupportedRouterError(
                f"{type(model).__name__} has two routers in decoder layer {router.layer}: {previous.name} and "
                f"{router.name}. A record has one slot a layer."
            )
        if (router.num_experts, router.top_k) != (first.num_experts, first.top_k):
            raise UnsupportedRouterError(
                f"{router.name} selects {router.top_k} of {router.num_experts} experts, but {first.name} selects "
                f"{first.top_k} of {first.num_experts}. A record has one K and one E for all layers."
            )
