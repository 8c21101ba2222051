"""Find the routers of a model by watching one forward of a few tokens, and check that each can be replayed.

Legend: N tokens of the probe, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ._compat import uses_kernels
from .gated_router import GateFormula, with_gating_op
from .gating import native_kernels
from .router_check import UnsupportedRouterError, check_router, evaluating, refusal, same_ids
from .selection import Router, TopKWatch

_PROBE_BATCH, _PROBE_TOKENS = 2, 8


@dataclass
class _TopK:
    module: nn.Module
    call_index: int
    columns: int
    top_k: int
    ids: Tensor


@dataclass
class _Event:
    """A mixture block reached its experts: what it had selected by then."""

    block: str
    selections: list[_TopK]
    ids_args: list[Tensor]  # integer arguments of the experts


@dataclass
class _Trace:
    """What one forward did."""

    topks: list[_TopK] = field(default_factory=list)
    events: list[_Event] = field(default_factory=list)
    calls: dict[nn.Module, list[tuple[tuple, dict, Any]]] = field(default_factory=dict)  # args, kwargs, output


def find_routers(model: nn.Module, gating: str = "auto") -> tuple[list[Router], str, int]:
    """
    Find the routers of a mixture-of-experts causal LM and check each on its real weights.

    The model scores a few tokens once, in evaluation mode and without gradients. A router is the module that makes the
    last top-k call before the experts of its block run; its place is the decoder-layer index in its module path.

    Args:
        model (`torch.nn.Module`):
            A Transformers model, bare or inside a `PeftModel`.
        gating (`str`, *optional*, defaults to `"auto"`):
            As in [`RouterReplay`].

    Returns:
        `tuple[list[Router], str, int]`: The routers by ascending decoder layer, the path of the module that owns the
        decoder layers, and the number of decoder layers.

    Raises:
        [`UnsupportedRouterError`]: If the model is dense, or one of its routers cannot be replayed.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedRouterError(f"{type(model).__name__} is an encoder-decoder. Replay needs a causal LM.")
    names = {module: name for name, module in model.named_modules()}
    experts = {module: name.rpartition(".")[0] for name, module in model.named_modules() if _is_experts(name)}
    trace = _probe(model, names, experts)
    if not trace.events:
        _refuse_without_events(model, names, experts, trace)
    routers = [
        _router_of(event, names, trace) for event in trace.events if not _is_static(event, model, names, experts)
    ]
    stack, num_decoder_layers = _decoder_stack(model, [router.name for router in routers])
    routers.sort(key=lambda router: router.layer)
    _check_uniform(model, routers)
    for router in routers:
        check_router(router, *trace.calls[router.module][0][:2])
    gated: list[Router] = []
    for router in routers:
        gated.append(_gated(router, trace, gating, likely=getattr(gated[-1], "formula", None) if gated else None))
    return gated, stack, num_decoder_layers


def _gated(router: Router, trace: _Trace, gating: str, likely: GateFormula | None) -> Router:
    args, kwargs, _ = trace.calls[router.module][0]
    device = next((value.device.type for value in args if torch.is_tensor(value)), "cpu")
    if gating == "intercept" or (gating == "auto" and device not in native_kernels()):
        return router
    gated = with_gating_op(router, args, kwargs, likely)
    if gated is None and gating == "op":
        raise refusal(router, "`masked_topk_gating` does not cover its gate. Set `gating='auto'`")
    return gated or router


def _is_experts(name: str) -> bool:
    # PEFT wraps the experts for `target_parameters`; the wrapper keeps the name and runs `base_layer`
    return name.rpartition(".")[2] == "experts"


def _probe(model: nn.Module, names: dict, experts: dict, embed: Callable[[Tensor], Tensor] | None = None) -> _Trace:
    """Run one forward and note every top-k, the module that made it, and every arrival at a block's experts."""
    trace, stack, counts = _Trace(), [], []
    seen = 0

    def enter(module: nn.Module, args: tuple) -> None:
        nonlocal seen
        if module in experts:
            ids_args = [arg.detach().clone() for arg in args if torch.is_tensor(arg) and not arg.is_floating_point()]
            trace.events.append(_Event(experts[module], trace.topks[seen:], ids_args))
            seen = len(trace.topks)
        stack.append(module)
        counts.append(0)

    def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        stack.pop()
        if counts.pop():
            trace.calls.setdefault(module, []).append((args, kwargs, output))

    def on_topk(call, func, args, kwargs):
        result = func(*args, **kwargs)
        if stack and call.scores.is_floating_point():
            trace.topks.append(_TopK(stack[-1], counts[-1], call.columns, call.top_k, result[1]))
            counts[-1] += 1
        return result

    # hooks of the models own classes run too; ours only watch
    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, with_kwargs=True)]
    try:
        with evaluating(model), TopKWatch(on_topk):
            _run_probe(model, embed)
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _run_probe(model: nn.Module, embed: Callable[[Tensor], Tensor] | None) -> None:
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    weight = embedding.weight
    if weight.is_meta or weight.numel() == 0:
        raise UnsupportedRouterError(
            f"the weights of {type(model).__name__} are not on this process (device {weight.device}, "
            f"{weight.numel()} elements of the embedding), so its routers cannot be checked. Attach after they are "
            "loaded."
        )
    vocab = embedding.num_embeddings
    ids = (torch.arange(_PROBE_BATCH * _PROBE_TOKENS, device=weight.device) * 7 + 3) % vocab
    ids = ids.reshape(_PROBE_BATCH, _PROBE_TOKENS)
    handle = None
    if embed is not None:
        handle = embedding.register_forward_hook(lambda module, args, output: embed(output))
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        if handle is not None:
            handle.remove()


def _refuse_without_events(model: nn.Module, names: dict, experts: dict, trace: _Trace) -> None:
    if experts:
        raise UnsupportedRouterError(
            f"{type(model).__name__} has {len(experts)} modules named `experts` "
            f"({next(iter(experts.values()))}.experts), but its forward called none of them{_kernel_hint(model)}. "
            "Replay needs routers that hand their selection to an `experts` module."
        )
    others = sorted({type(topk.module).__name__ for topk in trace.topks})
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


def _is_static(event: _Event, model: nn.Module, names: dict, experts: dict) -> bool:
    """Whether a block without a top-k selects by token id alone (hash routing), so that there is nothing to replay."""
    if _selecting(event, names) is not None:
        return False
    if event.ids_args:
        # other hidden states, same tokens
        other = _probe(model, names, experts, embed=_noise_like)
        twins = [twin for twin in other.events if twin.block == event.block]
        if len(twins) == 1 and all(map(torch.equal, event.ids_args, twins[0].ids_args)):
            return True
    block = model.get_submodule(event.block)
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in block.named_children())
    raise UnsupportedRouterError(
        f"{event.block} ({type(block).__name__}) of {type(model).__name__} reaches its experts without a `torch.topk`"
        f"{_kernel_hint(model)}: its children are {children}. Replay can only replace a top-k selection."
    )


def _noise_like(hidden: Tensor) -> Tensor:
    generator = torch.Generator(hidden.device).manual_seed(0)  # the global one belongs to the user
    noise = torch.randn(hidden.shape, generator=generator, device=hidden.device, dtype=torch.float32)
    return (noise * hidden.float().std() * 3).to(hidden.dtype)


def _selecting(event: _Event, names: dict) -> _TopK | None:
    """The last top-k that the block itself made before its experts ran; attention may make some, too."""
    inside = [topk for topk in event.selections if (names[topk.module] + ".").startswith(event.block + ".")]
    matching = [topk for topk in inside if any(same_ids(ids, topk.ids) for ids in event.ids_args)]
    return next(reversed(matching or inside), None)


def _router_of(event: _Event, names: dict, trace: _Trace) -> Router:
    topk = _selecting(event, names)
    assert topk is not None  # _is_static has raised otherwise
    name, calls = names[topk.module], trace.calls[topk.module]
    fired = len(calls)
    if fired != 1:
        raise UnsupportedRouterError(
            f"{name} ({type(topk.module).__name__}) ran {fired} times in one forward. A record has one slot a layer, "
            "so a router must run once."
        )
    output = calls[0][2]
    outputs = output if isinstance(output, tuple) else ()
    ids_output = next((i for i, value in enumerate(outputs) if same_ids(value, topk.ids)), None)
    layer = _layer_path(name)
    return Router(name, topk.module, layer[1], topk.columns, topk.top_k, topk.call_index, ids_output)


def _layer_path(name: str) -> tuple[str, int]:
    """Split a module path at its first index: 'model.layers.3.mlp.gate' -> ('model.layers', 3)."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if index is None:
        raise UnsupportedRouterError(f"router {name} is not inside a numbered decoder layer, so its layer is unknown.")
    return ".".join(parts[:index]), int(parts[index])


def _decoder_stack(model: nn.Module, names: list[str]) -> tuple[str, int]:
    stacks = {_layer_path(name)[0] for name in names}
    if len(stacks) != 1:
        raise UnsupportedRouterError(
            f"{type(model).__name__} has routers in {len(stacks)} stacks of layers ({', '.join(sorted(stacks))}). "
            "Replay needs them in one, the decoder."
        )
    path = stacks.pop()
    return path.rpartition(".")[0], len(model.get_submodule(path))  # type: ignore[arg-type]


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
