"""What the bits of a training forward depend on: told in a trace, and held against the model that replays it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from .._compat import implementations
from ..routers.gated import GatedRouter
from ..routers.router_replay import RouterReplay
from .trace import TraceFacts

# no forward of given tokens depends on these, and saving or training a model changes them
_INCIDENTAL = (
    *("name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
)

# by field of [`TraceFacts`]: what to do about it
_REMEDIES = {
    "dtype": "Load the model in this dtype (`dtype=...`).",
    "attention": "Load the model with `attn_implementation=...` as in the trace.",
    "experts": "Load the model with `experts_implementation=...` as in the trace.",
}


def conditions(model: nn.Module) -> dict[str, Any]:
    """
    What a model and its process say.

    Args:
        model (`torch.nn.Module`):
            The policy, unwrapped.

    Returns:
        dict of `str`: Fields of [`TraceFacts`] and their values.
    """
    config: Any = model.config
    attention, experts = implementations(model)
    device = next(model.parameters()).device
    on_cuda = device.type == "cuda"
    return {
        "model_type": str(config.model_type),
        "config_digest": _digest(config.to_dict()),
        "dtype": _dtypes(model.parameters()),
        "buffers": _dtypes(
            each for each in model.buffers() if each.is_floating_point()
        ),  # `to(dtype)` casts them, too
        "attention": attention,
        "experts": experts,
        "device": device.type,
        "processor": torch.cuda.get_device_name(device)
        if on_cuda
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "versions": {
            **{name: version(name) for name in ("torch", "transformers", "trl")},
            "trl-r3": __version__,  # of a checkout, too, which no metadata tells of
        },
    }


def autocast_dtype(context: Any, device: str) -> str:
    """The dtype that forwards inside a context are autocast to, or `"no"`."""
    with context:
        enabled = torch.is_autocast_enabled(device)
        return str(torch.get_autocast_dtype(device)).removeprefix("torch.") if enabled else "no"


def gating_mode(replay: RouterReplay) -> str:
    """How the selections of a model take effect."""
    gated = {isinstance(router, GatedRouter) for router in replay.routers}
    return "auto" if len(gated) == 2 else "op" if gated == {True} else "intercept"


def padding_mode(replay: RouterReplay) -> str:
    """What skipped padding in the last forward of a model that replayed, or will in the first."""
    return "none" if replay.padding is None else replay.padding.used


def refuse_another_model(facts: TraceFacts, here: dict[str, Any]) -> None:
    """
    Refuse a model that the trace is not of, or that computes in another way.

    Args:
        facts ([`TraceFacts`]):
            Those of the trace.
        here (dict of `str`):
            The [`conditions`] of the model.

    Raises:
        `ValueError`: Naming what differs, both values and what to do.
    """
    if facts.unreplayable is not None:
        raise ValueError(f"the trace cannot be replayed: {facts.unreplayable}")
    same_library = facts.versions.get("transformers") == here["versions"]["transformers"]
    if facts.model_type != here["model_type"] or (same_library and facts.config_digest != here["config_digest"]):
        raise ValueError(
            f"the trace is of a {facts.model_type} with config {facts.config_digest[:8]}, this model a "
            f"{here['model_type']} with {here['config_digest'][:8]}. Pass the model that was trained, with the "
            f"weights of step {facts.step}."
        )
    for name, remedy in _REMEDIES.items():
        if getattr(facts, name) != here[name]:
            raise ValueError(
                f"the trace was made with {name} {getattr(facts, name)}, this model has {here[name]}. {remedy}"
            )


def differences(facts: TraceFacts, here: dict[str, Any]) -> list[str]:
    """What may change bits and is not in the hands of whoever replays: what differs, and both values."""
    names = ("device", "processor", "matmul_precision", "buffers", "config_digest")
    pairs = [(name.replace("_", " "), getattr(facts, name), here[name]) for name in names]
    pairs += [(name, facts.versions.get(name, "none"), value) for name, value in here["versions"].items()]
    return [f"{name}: {then} in the trace, {now} here" for name, then, now in pairs if then != now]


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({str(each.dtype).removeprefix("torch.") for each in tensors}))


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_stripped(config), sort_keys=True, default=str).encode()).hexdigest()


def _stripped(config: Any) -> Any:
    """A config without what is incidental, in its parts as well."""
    if not isinstance(config, dict):
        return config

    def is_said(name: str) -> bool:
        return not name.startswith("_") and name not in _INCIDENTAL

    return {str(name): _stripped(value) for name, value in config.items() if is_said(str(name))}
