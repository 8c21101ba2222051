"""What a rollout computes with, for its time only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from trl_r3.cli.demo.noise import noisy_selection
from trl_r3.cli.demo.rounding import in_bfloat16


def in_fp8(weights: Tensor) -> Tensor:
    """To float8_e4m3 with one scale for the tensor."""
    scale = weights.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    return (weights / scale).to(torch.float8_e4m3fn).float() * scale


def in_integers(weights: Tensor, bits: int) -> Tensor:
    """To signed integers with a scale for each output."""
    largest = 2 ** (bits - 1) - 1
    scale = weights.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
    return (weights / scale).round().clamp(-largest, largest) * scale


ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "fp8": in_fp8,
    "int8": lambda weights: in_integers(weights, 8),
    "int4": lambda weights: in_integers(weights, 4),
}


def rollout_numerics(name: str, model: nn.Module, generator: torch.Generator) -> AbstractContextManager[None]:
    """
    Let a model compute as a rollout engine might.

    Args:
        name (`str`):
            `"exact"`; `"noise X"`: router logits with noise of X of their standard deviation, for the selection only;
            `"bf16"`: weights and arithmetic; `"fp8"`, `"int8"`, `"int4"`: the matrices of attention and experts,
            arithmetic in bfloat16.
        model (`torch.nn.Module`):
            The policy.
        generator (`torch.Generator`):
            Source of the noise.
    """
    if name == "exact":
        return nullcontext()
    if name == "bf16":
        return in_bfloat16(model)
    if name in ROUNDED:
        return _rounded_weights(model, ROUNDED[name])
    kind, _, level = name.partition(" ")
    if kind != "noise":
        raise ValueError(f"the rollout is {name!r}, expected 'exact', 'bf16', {', '.join(ROUNDED)} or 'noise X'.")
    return noisy_selection(model, float(level), generator)


@contextmanager
def _rounded_weights(model: nn.Module, rounded: Callable[[Tensor], Tensor]) -> Iterator[None]:
    with in_bfloat16(model):
        for name, parameter in model.named_parameters():
            if ("self_attn" in name or ".experts." in name) and parameter.ndim >= 2:
                parameter.data = rounded(parameter.data.float()).to(torch.bfloat16)
        yield
