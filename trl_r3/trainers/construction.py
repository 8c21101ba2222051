"""What is refused before a trainer is built: settings, models and parents that replay cannot work with."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ..routers.discovery import refuse_dense
from .config import RoutingReplayConfigMixin

_NEEDED = (
    "_generate_single_turn",
    "_generate",
    "_generate_and_score_completions",
    "_compute_loss",
    "_prepare_for_training",
    "_get_per_token_logps_and_entropies",
    "training_step",
    "prediction_step",
)


def check_parent(trainer: type, mixin: type) -> None:
    """
    Refuse a trainer that lacks what the mixin overrides: nothing would call the mixin, and nothing be replayed.

    Raises:
        `TypeError`: Naming the trainer and what it lacks.
    """
    parents = trainer.__mro__[trainer.__mro__.index(mixin) + 1 :]
    lacking = [name for name in _NEEDED if not any(name in vars(parent) for parent in parents)]
    if not lacking:
        loss = next(vars(parent)["_compute_loss"] for parent in parents if "_compute_loss" in vars(parent))
        wanted = list(inspect.signature(loss).parameters)[1:]
        if wanted == ["model", "inputs"]:
            return
        lacking = [f"_compute_loss(model, inputs), but has one of ({', '.join(wanted)})"]
    names = [parent.__name__ for parent in parents if parent.__name__.endswith("Trainer")]
    raise TypeError(
        f"{trainer.__name__} cannot replay: its parent {names[0] if names else parents[0].__name__} has no "
        f"{', '.join(lacking)}, through which routing replay reaches rollouts and losses. Use R3GRPOTrainer, "
        "R3GMPOTrainer or R3RLOOTrainer, or derive from a trainer that rolls out and scores as TRL's GRPOTrainer does."
    )


def check_shards(accelerator: Any) -> None:
    """
    Refuse the first FSDP: its parameters are slices of flat tensors, in which no router finds its weights.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            That of the trainer.

    Raises:
        `ValueError`: If Accelerate is set to it, as it is by default.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        raise ValueError(
            "`fsdp_version` is 1, routing replay needs 2: the flat parameters of the first FSDP hide the routers. Set "
            "`fsdp_version: 2` in the config of Accelerate."
        )


def check_setup(config: Any, model: Any) -> None:
    """
    Refuse what config and model tell, before TRL builds an engine for them.

    Args:
        config ([`~trl.GRPOConfig`]):
            Config of the trainer.
        model (`str` or `torch.nn.Module`):
            The policy.

    Raises:
        `ValueError`: Naming what cannot work and what to set instead.
    """
    if not isinstance(config, RoutingReplayConfigMixin):
        raise ValueError(
            f"`use_routing_replay` is set on a {type(config).__name__}, which does not check it. Use `R3GRPOConfig`."
        )
    settings: Any = config
    if settings.torch_compile:
        raise ValueError(
            "`torch_compile=True` runs past routing replay. Set `torch_compile=False`, or `use_routing_replay=False`."
        )
    if isinstance(model, str):
        model = _without_weights(model, config)
    if isinstance(model, nn.Module):
        refuse_dense(model)


def check_mask_setup(config: Any) -> None:
    """
    Refuse what sampling masks cannot work with, before TRL builds an engine.

    Args:
        config ([`~trl.GRPOConfig`]):
            Config of the trainer.

    Raises:
        `ValueError`: Naming what cannot work and what to set instead.
    """
    if config.torch_compile:
        raise ValueError(
            "`torch_compile=True` runs past sampling masks. Set `torch_compile=False`, or "
            "`use_sampling_mask_replay=False`."
        )


def _without_weights(name: str, config: Any) -> nn.Module | None:
    """The modules of a checkpoint, or `None` where they cannot be built from its config alone."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():  # whatever is built is sharded at once
        return None
    settings = config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {}
    trusted = {key: settings[key] for key in ("trust_remote_code", "revision") if key in settings}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, **trusted))
    except (OSError, ValueError):  # TRL will say what is wrong with the name; another architecture is checked later
        return None
