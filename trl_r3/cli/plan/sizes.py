"""What a config says of its model: parameters on the meta device, and the layout of a record.

Legend: L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._compat import is_causal_lm
from ...records.record import RoutingLayout
from ...routers.discovery import refuse_dense
from ...routers.router_replay import RouterReplay
from ..bad_input import BadInput
from ..configs import read_config
from ..models import adapter_base
from ..quantization import quantization_note
from ..twin import narrow_twin, one_thread
from .job import Job, PlanError


@dataclass(frozen=True)
class ModelFacts:
    """
    Sizes of a model.

    Args:
        name (`str`):
            As it was asked for.
        architecture (`str`):
            Class of the model.
        parameters (`int`):
            Of the base model.
        trainable (`int`):
            Those that are trained: all, or the adapters.
        quantizable (`int`):
            Parameters of `torch.nn.Linear` modules but the output head: what bitsandbytes turns into 4 bits.
        expert_parameters (`int`):
            Parameters of routed experts.
        largest_layer (`int`):
            Parameters of the largest decoder layer, gathered as a whole where weights are sharded.
        layout ([`RoutingLayout`]):
            Of its records.
        quantization (`str`, *optional*):
            What training makes of weights that are stored quantized.
    """

    name: str
    architecture: str
    parameters: int
    trainable: int
    quantizable: int
    expert_parameters: int
    largest_layer: int
    layout: RoutingLayout
    quantization: str | None = None


def read_model(name: str, job: Job) -> ModelFacts:
    """
    Build a model without weights from its config, and find its routers on a narrow twin.

    Args:
        name (`str`):
            Id on the Hugging Face Hub, or a local folder with a `config.json`.
        job ([`Job`]):
            Tells which adapters are trained.

    Returns:
        [`ModelFacts`].

    Raises:
        [`PlanError`]: If there is no such config, or it is not of a mixture of experts that can be replayed.
    """
    trusted = job.trust_remote_code
    config = _read_config(name, trusted)
    try:
        model = _without_weights(config, trusted)
        refuse_dense(model)
        # found by the package's own search, as a job finds it: on a twin of the real depth, experts and top-k
        with one_thread(), RouterReplay(narrow_twin(config, name, trusted), "intercept") as replay:
            layout = replay.layout
    except Exception as error:  # noqa: BLE001
        # the model's own code has run, on a twin that it may not expect
        raise PlanError(f"{name} cannot be planned: {_one_line(error)}") from error
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    experts = [module for path, module in model.named_modules() if path.endswith(".experts")]
    stack = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=_count)
    return ModelFacts(
        name,
        type(model).__name__,
        parameters=_count(model),
        quantizable=sum(_count(module) for module in linear),
        expert_parameters=sum(_count(module) for module in experts),
        largest_layer=max(_count(layer) for layer in stack),
        layout=layout,
        quantization=quantization_note(config),
        trainable=_adapters(model, job, name) if job.rank else _count(model),
    )


def with_adapters(model: ModelFacts, job: Job) -> ModelFacts:
    """
    The same model with the adapters of another job: its layers and routers are as they were.

    Args:
        model ([`ModelFacts`]):
            As [`read_model`] found it.
        job ([`Job`]):
            Tells which adapters are trained, if any.

    Returns:
        [`ModelFacts`].

    Raises:
        [`PlanError`]: If no module has one of the names that adapters are to go to.
    """
    if not job.rank:
        return replace(model, trainable=model.parameters)
    trusted = job.trust_remote_code
    weightless = _without_weights(_read_config(model.name, trusted), trusted)
    return replace(model, trainable=_adapters(weightless, job, model.name))


def _read_config(name: str, trust_remote_code: bool) -> Any:
    try:
        if Path(name).is_dir() and (base := adapter_base(name)) is not None:
            raise PlanError(f"{name} is an adapter of {base}. Pass that model, and `--lora-rank`.")
        return read_config(name, trust_remote_code)
    except BadInput as error:
        raise PlanError(str(error)) from error
    except Exception as error:  # noqa: BLE001
        # what a broken config raises depends on the class that reads it
        raise PlanError(
            f"{name} has no config that can be read ({_one_line(error)}): pass a folder with a config.json, such as "
            "examples/recipes/configs/qwen3-30b-a3b, or an id of the Hub where it can be reached."
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def _without_weights(config: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    causal = is_causal_lm(config)
    named = (getattr(config, "architectures", None) or [""])[0]
    auto = AutoModelForCausalLM if causal and not named.endswith("ForConditionalGeneration") else None
    with torch.device("meta"):
        return (auto or AutoModelForImageTextToText).from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )


def _adapters(model: Any, job: Job, name: str) -> int:
    from peft import LoraConfig, get_peft_model

    wanted = job.lora_target_modules
    modules = wanted if wanted == "all-linear" else wanted.split(",")
    adapters = LoraConfig(r=job.rank, target_modules=modules, task_type="CAUSAL_LM")
    try:
        with warnings.catch_warnings(action="ignore"):  # of what a training run would meet; here only sizes count
            adapted = get_peft_model(model, adapters, low_cpu_mem_usage=True)
    except ValueError as error:
        raise PlanError(f"`--lora-target-modules` does not fit {name}: {_one_line(error)}.") from error
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
