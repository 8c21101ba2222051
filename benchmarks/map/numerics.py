"""What a rollout computes in, for its time only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from trl_r3.cli.demo.rounding import in_bfloat16

from .model import gates


def rollout_numerics(name: str, model: nn.Module, generator: torch.Generator) -> AbstractContextManager[None]:
    """
    Let a model compute as a rollout engine might.

    Args:
        name (`str`):
            `"exact"`, `"bf16"`, `"fp8"` or `"noise X"`, as in [`Setting`].
        model (`torch.nn.Module`):
            The policy.
        generator (`torch.Generator`):
            Source of the noise: one of its own, so that arms sample alike as long as their weights are alike.
    """
    if name == "exact":
        return nullcontext()
    if name == "bf16":
        return in_bfloat16(model)
    if name == "fp8":
        return _weights_in_fp8(model)
    kind, level = name.split()
    if kind != "noise":
        raise ValueError(f"the rollout is {name!r}, expected 'exact', 'bf16', 'fp8' or 'noise X'.")
    return _noisy_routers(model, float(level), generator)


@contextmanager
def _weights_in_fp8(model: nn.Module) -> Iterator[None]:
    """Matrices rounded to float8_e4m3 with a scale for each, and everything computed in bfloat16."""
    with in_bfloat16(model):
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                scale = parameter.data.float().abs().max() / torch.finfo(torch.float8_e4m3fn).max
                rounded = (parameter.data.float() / scale).to(torch.float8_e4m3fn).float() * scale
                parameter.data = rounded.to(torch.bfloat16)
        yield


@contextmanager
def _noisy_routers(model: nn.Module, level: float, generator: torch.Generator) -> Iterator[None]:
    def perturb(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = args
        noise = torch.randn(hidden.shape, generator=generator, dtype=hidden.dtype)
        return (hidden + level * hidden.std(-1, keepdim=True) * noise, *rest)

    with ExitStack() as stack:
        for module in gates(model):
            stack.callback(module.register_forward_pre_hook(perturb).remove)
        yield
