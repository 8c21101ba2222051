"""Quirks of third parties, one function each, with the condition under which it can go."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.utils import _python_dispatch, checkpoint

_LIBRARIES = ("trl_r3", "trl", "transformers", "accelerate", "torch", "contextlib", "importlib")
_EXTRA_FIELDS = 5  # prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, ...


def in_backward() -> bool:
    """Whether this thread runs autograd's backward. Goes when PyTorch has a public way to ask."""
    return torch._C._current_graph_task_id() != -1


def transforms() -> list[str]:
    """
    The transforms of `torch.func` that this thread runs in ("Grad", "Vmap", "Jvp"), the outermost first. Goes when
    PyTorch has a public way to ask.
    """
    return [each.key().name for each in torch._C._functorch.get_interpreter_stack() or ()]


def warn(message: str) -> None:
    """
    Warn at the line of the user, through whatever libraries it calls this package.

    Goes when Python 3.12, whose `warnings.warn` has `skip_file_prefixes`, is the oldest that is supported.
    """
    frame = inspect.currentframe()
    assert frame is not None  # as in every Python that PyTorch runs in
    while frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES and frame.f_back is not None:
        frame = frame.f_back
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, RuntimeWarning, frame.f_code.co_filename, frame.f_lineno, registry=registry)


def unseen_by_checkpoints() -> AbstractContextManager:
    """
    Hide operators from selective activation checkpointing, which pairs those of a recompute with those of its forward
    by their order: what is compared in the forward only would shift it.

    Goes when `torch.utils.checkpoint` lets code inside a checkpoint leave it.
    """
    if not torch._C._len_torch_dispatch_stack():
        return nullcontext()
    selective = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)
    if not any(isinstance(mode, selective) for mode in _python_dispatch._get_current_dispatch_mode_stack()):
        return nullcontext()
    return _python_dispatch._disable_current_modes()


def checkpoint_functions(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Callable]]:
    """
    The functions through which modules call activation checkpointing: module, attribute, function.

    Transformers keeps it in `_gradient_checkpointing_func`, the wrapper of `torch.distributed` (FSDP's
    `activation_checkpointing`) in `checkpoint_fn`. Goes when checkpointing takes a context that its recompute
    re-enters in both of its variants; `context_fn` exists for the non-reentrant one only.
    """
    names = ("_gradient_checkpointing_func", "checkpoint_fn")
    return [(m, name, m.__dict__[name]) for m in modules for name in names if name in m.__dict__]


def without_checkpointing() -> dict[str, Any]:
    """
    The argument of a trainer's config that switches activation checkpointing off. Goes when no Transformers is
    supported that only knows it as `gradient_checkpointing`.
    """
    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)}
    return {"activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing": False}


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a hook of Accelerate runs a module of offloaded weights. Goes when Accelerate has a public way to ask."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return None if device is None else torch.device(device)


def fetches_weights(module: nn.Module) -> bool:
    """
    Whether weights that are not there are fetched when a module is called: by hooks (ZeRO-3), or by a forward in place
    of its own (offloading). Goes when PyTorch has a public way to ask for hooks.
    """
    return bool(module._forward_pre_hooks) or "forward" in vars(module)


def forward_hooks(module: nn.Module | None) -> tuple[dict[int, Callable], dict[int, Callable]]:
    """Hooks before and after the forward of a module, or of all, by ids. Goes when PyTorch has a public way to ask."""
    if module is None:
        return nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks
    return module._forward_pre_hooks, module._forward_hooks


def drops_out(module: nn.Module) -> bool:
    """Whether a module is a dropout of any dimension. Goes when PyTorch has a public base class of these."""
    return isinstance(module, nn.modules.dropout._DropoutNd)


def edits(tensor: torch.Tensor) -> int:
    """How often a tensor, or a view of its memory, was changed in place. Goes when PyTorch has a public counter."""
    return tensor._version


def find_causal_lm(model: nn.Module) -> Any:
    """The Transformers model in whatever wrapper, or `None`. Goes when wrappers have one public way to ask."""
    from transformers import PreTrainedModel

    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def shard_again(model: nn.Module) -> None:
    """
    Split weights that FSDP2 leaves whole after a forward without a backward: those of its root, whose readers (TRL's
    synchronisation of weights) expect shards. Goes when FSDP2 splits them after any forward without gradients.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def forget_forwards(model: nn.Module) -> None:
    """
    Let DeepSpeed's ZeRO-3 fetch weights as if no forward had been run. It fetches ahead what the forwards before used,
    the head too, which TRL's losses gather themselves, and a weight on its way cannot be partitioned when they are
    done. Goes when `deepspeed.zero.GatheredParameters` takes weights that are on their way.

    The model knows what fetches its weights only by the hook that begins its forward.
    """
    for hook in filter(inspect.isfunction, model._forward_pre_hooks.values()):
        begin = inspect.getclosurevars(hook).nonlocals.get("func", hook)  # DeepSpeed wraps it for profilers
        offload = inspect.getclosurevars(begin).nonlocals.get("self") if inspect.isfunction(begin) else None
        coordinator = getattr(offload, "get_param_coordinator", lambda: None)()
        if coordinator is not None and not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()


def pipeline_size(model: nn.Module) -> int:
    """
    Over how many processes the decoder layers are spread: by Transformers, or by Accelerate's `prepare_pippy`, which
    says no number. Goes when both tell it the same way.
    """
    distributed = getattr(getattr(model, "config", None), "distributed_config", None)
    stages = getattr(model, "hf_split_points", None)
    return len(stages) + 1 if isinstance(stages, list) else getattr(distributed, "pp_size", None) or 1


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` runs a module without its Python forward. Goes when PyTorch has a public way to ask."""
    return isinstance(model, torch._dynamo.OptimizedModule) or getattr(model, "_compiled_call_impl", None) is not None


def uses_kernels(model: Any) -> bool:
    """Whether `use_kernels=True` replaced forwards of the model. Goes when Transformers has a public attribute."""
    return bool(getattr(model, "_use_kernels", False))


def set_checkpointing(model: Any, kwargs: dict[str, bool] | None) -> None:
    """
    Switch activation checkpointing of a Transformers model on, with these arguments, or off. Goes when no Transformers
    is supported that only knows it as `gradient_checkpointing_enable`.
    """
    verb = "disable" if kwargs is None else "enable"
    names = (f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}")
    switch = next(getattr(model, name) for name in names if hasattr(model, name))
    switch(*(() if kwargs is None else (kwargs,)))


def implementations(model: Any) -> tuple[str, str]:
    """
    How a model computes attention, and its experts. Goes when Transformers has public attributes for what was chosen.
    """
    config = model.config
    return str(config._attn_implementation), str(getattr(config, "_experts_implementation", None))


def uses_prompt_learning(model: nn.Module) -> bool:
    """
    Whether an adapter prepends tokens of its own, which no engine returns routes for. Goes when PEFT tells more than
    the kind of its config.
    """
    from peft import PeftModel

    adapters = (module for module in model.modules() if isinstance(module, PeftModel))
    return any(config.is_prompt_learning for adapter in adapters for config in adapter.peft_config.values())


def adapters_are_off(model: nn.Module) -> bool:
    """
    Whether this forward of a PEFT model is the reference policy's.

    TRL computes it in the policy's own module, with the adapters disabled or the frozen copy named "ref" active, and
    tells callees by no argument. Goes when it does.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel):
        return False
    if "ref" in model.active_adapters:
        return True
    return any(isinstance(module, BaseTunerLayer) and module.disable_adapters for module in model.modules())


def extra_fields(generated: tuple) -> dict[str, Any]:
    """
    What a `rollout_func` returned beside tokens and log-probabilities, in the output of TRL's `_generate`.

    It is a plain tuple, of eight values in GRPO and fewer in RLOO. Goes when TRL names its values.
    """
    return generated[_EXTRA_FIELDS]


def buffered_inputs(trainer: Any) -> list[dict[str, Any]]:
    """The micro-batches of TRL's last rollout, as updates take them. Goes when TRL says which samples it trains on."""
    return trainer._buffered_inputs or []


def forget_buffered_inputs(trainer: Any) -> None:
    """Let TRL roll out before the next update. Goes when no `train()` of TRL begins with what the last one left."""
    trainer._buffered_inputs = None


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let `owner.name` be `value` inside. Each use goes when its owner takes the value as an argument."""
    had, own = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, own)
        else:
            delattr(owner, name)


@contextmanager
def scoring_head(head: Any) -> Iterator[None]:
    """
    Let TRL's scoring forward hand hidden states and head to `head.apply`. Goes when `add_fused_lm_head` takes the
    function as an argument.
    """
    from trl.trainer import utils

    with swapped(utils, "_ChunkedLogProbFunction", head):
        yield


def is_causal_lm(config: Any) -> bool:
    """
    Whether `AutoModelForCausalLM` builds a model of this config: one of its own, or one whose code came with the
    config. Goes when it has a public way to ask.
    """
    from transformers import AutoModelForCausalLM

    if type(config).__module__.startswith("transformers_modules."):
        return "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return type(config) in AutoModelForCausalLM._model_mapping


def has_model(config: Any) -> bool:
    """
    Whether Transformers itself builds a model for text, or for text and images, of this config. Goes when its auto
    classes have a public way to ask.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return any(type(config) in auto._model_mapping for auto in (AutoModelForCausalLM, AutoModelForImageTextToText))


def only_its_engine_goes_back(model: nn.Module) -> bool:
    """
    Whether ZeRO-3 has partitioned weights: a backward that does not begin in DeepSpeed's engine is an error, or makes
    one of the next step, though it asks for no gradient of a weight. Goes when its hooks take such a backward.
    """
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
