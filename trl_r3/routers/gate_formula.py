"""What the gate of a router may be as arguments of `masked_topk_gating`.

Legend: N tokens of a forward (B * T), E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..gating import GatingOutput, masked_topk_gating
from .router import Router


@dataclass(frozen=True)
class GateFormula:
    """
    Arguments of [`masked_topk_gating`] that reproduce a router's gate.

    Args:
        in_float32 (`bool`):
            Whether the logits are a product in float32, of whatever the inputs and the weight are.
        bias (`str`, *optional*):
            Attribute of the router that holds the selection bias; it may be updated while the model trains.
        score, renormalize, eps, scale, n_group, topk_group, group_score, weights_dtype:
            As in [`masked_topk_gating`].
    """

    in_float32: bool
    bias: str | None
    score: str
    renormalize: bool
    eps: float
    scale: float
    n_group: int
    topk_group: int
    group_score: str
    weights_dtype: torch.dtype

    def logits(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """(N, E) logits of a router's input, of shape (..., H)."""
        weight: Any = module.weight
        bias: Any = getattr(module, "bias", None)
        hidden_NH = hidden.reshape(-1, hidden.shape[-1])
        if self.in_float32:
            hidden_NH, weight, bias = hidden_NH.float(), weight.float(), None if bias is None else bias.float()
        return F.linear(hidden_NH, weight, bias)

    def __call__(
        self, module: nn.Module, logits_NE: Tensor, top_k: int, recorded_NK: Tensor | None, compare: bool = False
    ) -> GatingOutput:
        """Weights, ids and status of `module`'s gate for these logits."""
        return masked_topk_gating(
            logits_NE,
            top_k,
            recorded_NK,
            score=self.score,
            renormalize=self.renormalize,
            bias=None if self.bias is None else getattr(module, self.bias),
            n_group=self.n_group,
            topk_group=self.topk_group,
            group_score=self.group_score,
            eps=self.eps,
            scale=self.scale,
            weights_dtype=self.weights_dtype,
            compare_live=compare,
        )


def candidates(
    module: nn.Module, num_experts: int, biases: list[str | None], in_float32: bool, dtype: torch.dtype
) -> Iterator[GateFormula]:
    """Formulas that a router could have by the numbers it holds, with one of these biases, of weights of a dtype."""
    scales = [1.0, *(value for value in vars(module).values() if isinstance(value, float) and value != 1.0)]
    groups = [(1, 1, "top2_sum")]
    counts = {value for value in vars(module).values() if type(value) is int and 1 < value < num_experts}
    groups += [
        (n_group, topk_group, score)
        for n_group, topk_group, score in product(sorted(counts), sorted(counts | {1}), ("top2_sum", "max"))
        if num_experts % n_group == 0 and topk_group <= n_group
    ]
    scores = (("softmax", 0.0), ("topk_softmax", 0.0), ("sigmoid", 1e-20), ("sigmoid", 1e-6), ("sqrtsoftplus", 1e-20))
    for group, bias, (score, eps), renormalize, scale in product(groups, biases, scores, (True, False), scales):
        yield GateFormula(in_float32, bias, score, renormalize, eps, scale, *group, weights_dtype=dtype)


def selection_biases(
    router: Router, forward: Callable, args: tuple, kwargs: dict[str, Any], output: tuple[Tensor, Tensor, Tensor]
) -> list[str | None] | None:
    """
    Find the selection bias among the tensors of a router that have a number for each expert. One that is still zero
    would go unnoticed, so each is changed for one forward.

    Args:
        router ([`Router`]):
            The router.
        forward (`Callable`):
            Its own forward, in a call of it.
        args, kwargs:
            Arguments of that call.
        output (`tuple`):
            What it returns: logits, weights, ids.

    Returns:
        list of one name, or of `None` where there is no such bias. `None` instead of a list where there are several,
        where a tensor takes part in the gate in another way than as the `bias` of the logits, or where the router is
        given one.
    """
    given = [value for value in (*args[1:], *kwargs.values()) if torch.is_tensor(value)]
    if any(value.is_floating_point() and value.shape[-1:] == (router.num_experts,) for value in given):
        return None  # a bias that the block holds, and that may still be zero
    logits, weights, ids = output
    spread = float(logits.abs().max()) + 1.0
    found: list[str | None] = []
    for name in _of_experts(router.module, router.num_experts):
        with torch.no_grad(), _changed(router.module, name, spread):
            other = forward(*args, **kwargs)
        selects = not torch.equal(other[2].sort(-1).values, ids.sort(-1).values)
        in_logits = not torch.equal(other[0], logits)
        if in_logits != (name == "bias") or (not selects and not torch.equal(other[1], weights) and not in_logits):
            return None
        if selects and not in_logits:
            found.append(name)
    return None if len(found) > 1 else found or [None]


def _of_experts(module: nn.Module, num_experts: int) -> list[str]:
    tensors = [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]
    return [name for name, tensor in tensors if tensor.shape == (num_experts,) and tensor.is_floating_point()]


@contextmanager
def _changed(module: nn.Module, name: str, spread: float) -> Iterator[None]:
    """Let a tensor have other numbers inside; it is put back itself, whoever holds it."""
    own: Any = getattr(module, name)
    generator = torch.Generator(own.device).manual_seed(0)  # the global one belongs to the user
    noise = torch.randn(own.shape, generator=generator, device=own.device, dtype=torch.float32) * spread
    other = own.detach() + noise.to(own.dtype)
    setattr(module, name, nn.Parameter(other, requires_grad=False) if isinstance(own, nn.Parameter) else other)
    try:
        yield
    finally:
        setattr(module, name, own)
