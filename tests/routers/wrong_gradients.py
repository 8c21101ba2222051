"""Gradients that are wrong where the values are right, for trials that have to see it."""

import torch


class _TimesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, factor):
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None


def with_gradient_times(factor: float, value: torch.Tensor) -> torch.Tensor:
    """The value as it is, whose gradient comes back multiplied."""
    return _TimesInBackward.apply(value, factor)
