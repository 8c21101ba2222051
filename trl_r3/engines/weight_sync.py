"""Merged weights for vLLM from copies: the base of an adapter stays bit for bit what it was.

TRL merges an adapter into the policy, sends what it reads of it, and takes the adapter out again. In bfloat16 that
does not restore the base (https://github.com/huggingface/trl/issues/6688), and the saved adapter then belongs to a
base that nobody has.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.func import functional_call

from .._compat import swapped
from ._compat_engines import forgotten_merge

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer


def keep_base(generation: Any) -> None:
    """
    Let each synchronisation of weights with vLLM send merged copies, and leave the base of the adapter as it is.

    A policy without an adapter is left to TRL, and so is the first FSDP, whose parameters are slices of flat tensors.

    Args:
        generation ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            That of a trainer, for as long as it lives.
    """
    plugin = getattr(generation.accelerator.state, "fsdp_plugin", None)
    if not hasattr(generation.model, "merge_adapter") or (plugin is not None and plugin.fsdp_version == 1):
        return
    own_sync = generation.sync_weights

    def sync_weights() -> None:
        with merged_copies(generation.model, generation.accelerator.device):
            own_sync()

    generation.sync_weights = sync_weights


@contextmanager
def merged_copies(model: Any, device: torch.device) -> Iterator[None]:
    """
    Let `merge_adapter` of a PEFT model change nothing inside: until `unmerge_adapter`, `named_parameters` yields
    merged copies in place of the weights that it adapts, one layer at a time.

    Args:
        model ([`~peft.PeftModel`]):
            The policy.
        device (`torch.device`):
            Where shards are put together, which may be kept on the host.

    Raises:
        `RuntimeError`: If the copies were not read before `unmerge_adapter`.
        `ValueError`: If a layer merges into more than the weights of its base layer.
    """
    copies = _MergedCopies(model, device)
    with ExitStack() as stack:
        for name in ("named_parameters", "merge_adapter", "unmerge_adapter"):
            stack.enter_context(swapped(model, name, getattr(copies, name)))
        yield


class _MergedCopies:
    """What a PEFT model answers while its weights are sent."""

    def __init__(self, model: Any, device: torch.device) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.own_parameters, self.own_merge, self.device = model.named_parameters, model.merge_adapter, device
        self.layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self.merged, self.complete = False, False

    def merge_adapter(self) -> None:
        """PEFT checks that it could, and is asked to merge none."""
        refused = [layer for layer in self.layers if isinstance(layer.get_base_layer(), nn.MultiheadAttention)]
        if refused:
            raise ValueError(
                f"{len(refused)} adapters of {type(refused[0].get_base_layer()).__name__} are merged into more than "
                "the weights of their own layer, so that no copy of a layer can be sent to vLLM. Leave these modules "
                "out of `target_modules`, or set `use_vllm=False`."
            )
        self.own_merge(adapter_names=[])
        self.merged, self.complete = True, False

    def unmerge_adapter(self) -> None:
        """There is nothing to undo."""
        self.merged = False
        if not self.complete:
            raise RuntimeError(
                f"{len(self.layers)} layers have adapters, and not all were read through `named_parameters` of the "
                "policy between `merge_adapter` and `unmerge_adapter`, so vLLM may have been sent weights without "
                "them. Use TRL 1.16, or set `use_vllm=False`."
            )

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Those of the model, with merged copies in place of the weights that would be merged into."""
        if not self.merged:
            yield from self.own_parameters(*args, **kwargs)
            return
        layers_of: dict[int, list[BaseTunerLayer]] = {}  # more than one where weights are tied
        for layer in self.layers:
            for parameter in adapted_weights(layer):
                layers_of.setdefault(id(parameter), []).append(layer)
        waiting, copies = set(self.layers), dict[int, torch.Tensor]()
        for name, parameter in self.own_parameters(*args, **kwargs):
            for layer in layers_of.get(id(parameter), ()):
                if layer in waiting:  # or its copies were made with those of its other weight
                    waiting.remove(layer)
                    _merge(layer, copies, self.device)
            yield name, copies.pop(id(parameter), parameter)
        self.complete = not waiting


def adapted_weights(layer: BaseTunerLayer) -> list[nn.Parameter]:
    """
    The weights that adapters of one layer are merged into.

    Args:
        layer ([`~peft.tuners.tuners_utils.BaseTunerLayer`]):
            A layer of PEFT, of modules or of a parameter, such as the experts of a MoE layer.
    """
    base, name = layer.get_base_layer(), getattr(layer, "parameter_name", None)
    return [getattr(base, name)] if name else list(base.parameters(recurse=False))


def _merge(layer: Any, copies: dict[int, torch.Tensor], device: torch.device) -> None:
    """Let a layer merge into copies of its weights, new or there already, which are kept by the ids of these."""
    adapted = {id(parameter) for parameter in adapted_weights(layer)}
    weights, names, meshes = {}, {}, {}
    for name, parameter in layer.named_parameters():
        if id(parameter) in adapted:
            names[id(parameter)] = name
            meshes[id(parameter)] = getattr(parameter, "device_mesh", None)
            weights[name] = _whole(copies.get(id(parameter), parameter), device, own=id(parameter) not in copies)
        elif isinstance(parameter, DTensor) and "base_layer" not in name.split("."):
            weights[name] = _whole(parameter, device)
    merging = _Merging(layer, list(names.values()))
    with torch.no_grad(), forgotten_merge(layer):
        merged = functional_call(merging, {f"layer.{name}": weight for name, weight in weights.items()}, ())
    for key, weight in zip(names, merged, strict=True):
        mesh = meshes[key]  # whoever reads shards puts them together
        copies[key] = weight if mesh is None else DTensor.from_local(weight, mesh, [Replicate()] * mesh.ndim)


class _Merging(nn.Module):
    """A layer whose forward merges, for PyTorch to swap its weights meanwhile."""

    def __init__(self, layer: Any, names: list[str]) -> None:
        super().__init__()
        self.layer, self.names = layer, names

    def forward(self) -> list[torch.Tensor]:
        self.layer.merge()
        found = [name.rpartition(".") for name in self.names]
        return [getattr(self.layer.get_submodule(module), name).data for module, _, name in found]


def _whole(weight: torch.Tensor, device: torch.device, own: bool = False) -> torch.Tensor:
    """Of all processes, and with memory of its own if it is to be changed."""
    if isinstance(weight, DTensor):
        whole = weight.to(device).full_tensor()  # type: ignore[attr-defined]
        return whole.clone() if own and whole.data_ptr() == weight.to_local().data_ptr() else whole
    if not own:
        return weight
    return weight.detach().clone() if weight.is_floating_point() else copy.deepcopy(weight)  # with what unpacks it
