"""A model for the time of a rollout or of a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_bfloat16(model: nn.Module) -> Iterator[None]:
    """Let a float32 model be its bfloat16 copy inside; afterwards the weights are what they were, bit for bit."""
    own = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        for parameter, data in own:
            parameter.data = data.to(torch.bfloat16)
        yield
    finally:
        for parameter, data in own:
            parameter.data = data
