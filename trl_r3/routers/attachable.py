"""Which models routing replay can be attached to, before anything in them is looked at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn

from torch import nn

from .._compat import is_compiled, pipeline_size, transforms, uses_prompt_learning
from .gated import GatedRouter
from .patches import Patch
from .router import Router
from .self_check import UnsupportedRouterError


def attachable(model: nn.Module) -> nn.Module:
    """
    Refuse what nothing can be attached to.

    Args:
        model (`torch.nn.Module`):
            The model, in whatever wrapper.

    Returns:
        `torch.nn.Module`: The model without the wrappers of Accelerate.

    Raises:
        `TypeError`: If it is no Transformers model.
        `ValueError`: If it is compiled or already attached.
        [`UnsupportedRouterError`]: If an adapter prepends tokens of its own, or the model is split into stages or
            copied to several devices.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the model is a {type(model).__name__}, expected a torch.nn.Module. Load it first: "
            f"`AutoModelForCausalLM.from_pretrained(...)`."
        )
    unwrapped = _unwrap(model)
    if not hasattr(unwrapped, "get_input_embeddings"):
        raise TypeError(
            f"{type(unwrapped).__name__} has no `get_input_embeddings`, so it is no Transformers model. Pass the "
            "causal LM that holds it, or that it holds."
        )
    forwards = (module.__dict__.get("forward") for module in unwrapped.modules())
    if any(isinstance(forward, Patch) and not forward.removed for forward in forwards):
        raise ValueError(
            "the model already has routing replay attached. Use the handle that exists, or call "
            "`disable_routing_replay(model)` (`remove()` of the handle) first."
        )
    if is_compiled(model) or is_compiled(unwrapped):
        raise ValueError(
            f"{type(unwrapped).__name__} is compiled: `torch.compile` would run past the replay. Attach to a model "
            "that is not; its layers may be, one by one (`layer.compile()`)."
        )
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise UnsupportedRouterError(
            f"`nn.DataParallel` copies {type(unwrapped).__name__} to {len(model.device_ids)} devices in each forward, "
            "and copies have no record. Start one process a device (`accelerate launch`, `torchrun`)."
        )
    if pipeline_size(unwrapped) > 1:
        raise UnsupportedRouterError(
            f"{type(unwrapped).__name__} is split into {pipeline_size(unwrapped)} stages by pipeline parallelism: "
            "each process has a part of the routers, and a record has all of them. Shard it with FSDP2, ZeRO or "
            "tensor parallelism (`pp_size=1`)."
        )
    if uses_prompt_learning(model):
        raise UnsupportedRouterError(
            f"{type(model).__name__} learns a prompt: its adapter prepends tokens that are in no record. Use another "
            "kind of adapter (LoRA), or set `use_routing_replay=False`."
        )
    return unwrapped


def refuse_unseen(modules: Iterable[nn.Module], routers: Sequence[Router], records: bool) -> None:
    """
    Refuse to record or replay where what runs is out of sight.

    Args:
        modules (iterable of `torch.nn.Module`):
            The model and its wrapper, which may have been compiled after they were attached to.
        routers (sequence of [`Router`]):
            Its routers.
        records (`bool`):
            Whether it records.
    """
    compiled = next((type(module).__name__ for module in modules if is_compiled(module)), None)
    if compiled is not None:
        raise RuntimeError(
            f"{compiled} was compiled after routing replay was attached, which would run past it. Do not call "
            "`compile()` on the model, or remove the handle first."
        )
    kinds = transforms()
    if records and "Vmap" in kinds:
        raise RuntimeError(
            "`record()` inside `torch.vmap`, where a forward has no values that could be kept: nothing would be "
            "recorded. Record the batch in a forward outside."
        )
    if kinds and any(isinstance(router, GatedRouter) for router in routers):
        raise RuntimeError(
            f"a forward inside a transform of `torch.func` ({', '.join(kinds).lower()}), which the gating op does not "
            'know. Attach with `gating="intercept"`.'
        )


def refuse_unread() -> NoReturn:
    """What raises where a record comes to the decoder that nobody has taken on the way."""
    raise RuntimeError(
        "`routed_experts` was passed to a model that does not take it, so nothing of it would be replayed. Call the "
        "model that was enabled with `enable_routing_replay`, or use `replay()`."
    )


def _unwrap(model: nn.Module) -> nn.Module:
    from accelerate.utils import extract_model_from_parallel  # imports slowly

    return extract_model_from_parallel(model, keep_torch_compile=True)
