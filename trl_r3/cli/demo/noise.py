"""Noise on the router logits of a rollout: the experts that it selects, not their weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..._compat import swapped


@contextmanager
def noisy_selection(model: nn.Module, level: float, generator: torch.Generator) -> Iterator[None]:
    """
    Let the routers of a model select experts by noisy logits, and weigh them by the clean ones.

    Args:
        model (`torch.nn.Module`):
            A mixture of experts whose routers call `torch.topk` on their probabilities.
        level (`float`):
            Standard deviation of the noise, in units of that of a token's logits.
        generator (`torch.Generator`):
            Source of the noise.
    """

    def topk(probabilities: Tensor, k: int, dim: int = -1, **kwargs: Any):
        logits = probabilities.log()
        noise = torch.randn(logits.shape, generator=generator)
        noisy = logits + level * logits.std(dim, keepdim=True) * noise
        ids = torch.topk(noisy, k, dim=dim, **kwargs).indices
        return torch.return_types.topk((probabilities.gather(dim, ids), ids))

    torch_here = ModuleType("torch")
    torch_here.__dict__.update(torch.__dict__)
    torch_here.topk = topk  # type: ignore[attr-defined]
    code = {sys.modules[type(module).__module__] for name, module in model.named_modules() if name.endswith(".gate")}
    with ExitStack() as stack:
        for module in code:
            stack.enter_context(swapped(module, "torch", torch_here))
        yield
