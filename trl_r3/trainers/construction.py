"""What happens while a trainer is built: settings, models and parents are refused, engines made to record."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from trl.import_utils import is_vllm_available

from .._compat import warn
from ..engines.continuous_batching import recordable_config
from ..engines.generate import check_decoding
from ..engines.vllm_colocate import recording_llm
from ..engines.vllm_masks import check_mask_settings
from ..engines.vllm_server import recording_client
from ..routers.discovery import refuse_dense
from ._compat_trainers import warn_of_unknown_ends
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


def check_parent(trainer: type, ours: type) -> None:
    """
    Refuse a trainer that lacks what the mixin overrides: nothing would call the mixin, and nothing be replayed.

    Args:
        trainer (`type`):
            The class that is made.
        ours (`type`):
            The last class of this package in its `__mro__`: what the package overrides says nothing of a parent.

    Raises:
        `TypeError`: Naming the trainer and what it lacks.
    """
    parents = trainer.__mro__[trainer.__mro__.index(ours) + 1 :]
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
        "R3GMPOTrainer or R3RLOOTrainer, for distillation R3DistillationTrainer, R3SDPOTrainer or R3IWOPDTrainer, or "
        "derive from a trainer that rolls out and scores as TRL's GRPOTrainer does."
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


def check_compiler(accelerator: Any, routes: bool) -> None:
    """
    Refuse a compiler that Accelerate was told of, which compiles the policy as `torch_compile` does.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            That of the trainer.
        routes (`bool`):
            Whether experts are replayed, or sampling masks alone.

    Raises:
        `ValueError`: If it compiles what it prepares.
    """
    backend = accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO:
        setting = f"`dynamo_backend: {backend.value}` of Accelerate"
        raise _past_replay(setting, "`dynamo_backend: 'NO'` in its config", routes)


def _past_replay(compiled: str, remedy: str, routes: bool) -> ValueError:
    what, switch = "sampling masks", "use_sampling_mask_replay"
    if routes:
        what, switch = "routing replay", "use_routing_replay"
    return ValueError(f"{compiled} runs past {what}. Set {remedy}, or `{switch}=False`.")


def config_from(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The config among the arguments of a trainer, or `None`."""
    return kwargs.get("args") or next((arg for arg in args if hasattr(arg, "per_device_train_batch_size")), None)


def check_setup(config: Any, model: Any, routes: bool, masks: bool) -> None:
    """
    Refuse what config and model tell, before TRL builds an engine for them.

    Args:
        config ([`~trl.GRPOConfig`], *optional*):
            Config of the trainer.
        model (`str` or `torch.nn.Module`):
            The policy.
        routes, masks (`bool`):
            What is to be replayed.

    Raises:
        `ValueError`: Naming what cannot work and what to set instead.
    """
    if isinstance(config, RoutingReplayConfigMixin):
        config.check_replay()
    if (routes or masks) and config.torch_compile:
        raise _past_replay("`torch_compile=True`", "`torch_compile=False`", routes)
    if not routes:
        return
    if not isinstance(config, RoutingReplayConfigMixin):
        raise ValueError(
            f"`use_routing_replay` is set on a {type(config).__name__}, which does not check it. Use `R3GRPOConfig`, "
            "or the config of this package that goes with the trainer."
        )
    if isinstance(model, str):
        model = _without_weights(model, config)
    if isinstance(model, nn.Module):
        refuse_dense(model)


def warn_if_off(trainer: type, config: Any) -> None:
    """
    Say once, at construction, that a trainer of this package was asked for no replay.

    Args:
        trainer (`type`):
            Its class.
        config ([`~trl.GRPOConfig`], *optional*):
            Its config.
    """
    given = "no config" if config is None else f"a {type(config).__name__} without `use_routing_replay=True`"
    warn(
        f"{trainer.__name__} was given {given}, so nothing is replayed: it trains as its parent in TRL does. Set "
        "`use_routing_replay=True` on the config that goes with it (R3GRPOConfig with R3GRPOTrainer), or use the "
        "parent to train without replay on purpose."
    )


def check_switches(args: Any, session: Any) -> None:
    """
    Refuse a switch that was turned since the trainer was built: engine and trainer stay as they were built.

    Args:
        args ([`~trl.GRPOConfig`], *optional*):
            The config, as it is when training begins.
        session ([`ReplaySession`], *optional*):
            What the trainer was built with; `None` if nothing is replayed.

    Raises:
        `ValueError`: Naming the switch, both values and what to do instead.
    """
    for name, part in (("use_routing_replay", "routes"), ("use_sampling_mask_replay", "masks")):
        built, asked = bool(getattr(session, part, False)), bool(getattr(args, name, False))
        if built != asked:
            raise ValueError(
                f"`{name}` is {asked}, but the trainer was built with {built}, and trains so. Construct another with "
                f"`{name}={asked}`, or set it back to {built}."
            )


def check_generation(trainer: Any, routes: bool) -> None:
    """
    Refuse rollouts of the policy itself that could not be recorded, and warn of ends that TRL does not cut at.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer, constructed.
        routes (`bool`):
            Whether experts are recorded.

    Raises:
        `ValueError`: Naming the setting.
    """
    batching = getattr(trainer, "continuous_batching_config", None)  # which students have not
    if batching is not None:
        recordable_config(batching)
        _warn_of_cast(trainer)
    elif not trainer.use_vllm:
        if routes:
            check_decoding(trainer.model, {"generation_config": trainer.generation_config})
        warn_of_unknown_ends(trainer)


def _warn_of_cast(trainer: Any) -> None:
    """Say once that TRL rounds the weights it trains when continuous batching first generates."""
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else None
    wider = [each for each in trainer.model.state_dict().values() if each.dtype in (torch.float32, torch.float64)]
    if dtype is None or not wider:
        return
    count, setting = sum(map(torch.numel, wider)), "bf16" if trainer.args.bf16 else "fp16"
    warn(
        f"the policy has {count} weights and buffers in {wider[0].dtype}, and with `{setting}=True` TRL casts them to "
        f"{dtype} for good when continuous batching first generates, selection biases of routers included. Load the "
        f"policy in {dtype} to train what you see, set `{setting}=False`, or leave continuous batching out."
    )


@contextmanager
def recording_engine(config: Any, routes: bool, masks: bool) -> Iterator[None]:
    """
    Let a trainer that is constructed inside get a vLLM that returns what is replayed.

    Args:
        config ([`~trl.GRPOConfig`], *optional*):
            Config of the trainer.
        routes, masks (`bool`):
            What is replayed.

    Raises:
        `ImportError`: If vLLM is not installed.
        `ValueError`: If its version or sampling settings return it not.
    """
    routes = routes and config.routing_replay_mode == "R3"
    if not (routes or masks) or not config.use_vllm:
        yield
        return
    if masks:
        check_mask_settings(config)
    if not is_vllm_available():
        raise ImportError(
            "`use_vllm=True` needs vLLM, which is not installed. Install it with `pip install 'trl[vllm]'`, or set "
            "`use_vllm=False`."
        )
    if config.vllm_mode == "server":
        with recording_client(routes, masks):
            yield
        return
    with recording_llm(routes, masks, config.vllm_tensor_parallel_size):
        yield


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
