"""Which models routing replay can be attached to, before anything in them is looked at."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .._compat import is_compiled, pipeline_size, uses_prompt_learning
from .patches import Patch
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


def refuse_compiled(modules: Iterable[nn.Module]) -> None:
    """Refuse to record or replay what was compiled after it was attached to."""
    compiled = next((type(module).__name__ for module in modules if is_compiled(module)), None)
    if compiled is not None:
        raise RuntimeError(
            f"{compiled} was compiled after routing replay was attached, which would run past it. Do not call "
            "`compile()` on the model, or remove the handle first."
        )


def _unwrap(model: nn.Module) -> nn.Module:
    from accelerate.utils import extract_model_from_parallel  # imports slowly

    return extract_model_from_parallel(model, keep_torch_compile=True)
