"""Routers whose gate `masked_topk_gating` computes: the op takes the place of everything after the logits.

Legend: N tokens of a forward (B * T), E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .gating import masked_topk_gating
from .selection import Router

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class GateFormula:
    """
    Arguments of [`masked_topk_gating`] that reproduce a router's gate.

    Args:
        logits_call (`int`):
            Which torch function of the router's forward returns its logits.
        bias (`str`, *optional*):
            Attribute of the router that holds the selection bias; it may be updated while the model trains.
        score, renormalize, eps, scale, n_group, topk_group, group_score, weights_dtype:
            As in [`masked_topk_gating`].
    """

    logits_call: int
    bias: str | None
    score: str
    renormalize: bool
    eps: float
    scale: float
    n_group: int
    topk_group: int
    group_score: str
    weights_dtype: torch.dtype

    def __call__(self, module: nn.Module, logits_NE: Tensor, top_k: int, recorded_NK: Tensor | None) -> Any:
        """Weights and ids of `module`'s gate for these logits."""
        return masked_topk_gating(
            logits_NE,
            top_k,
            recorded_NK,
            score=self.score,
            renormalize=self.renormalize,
            bias=None if self.bias is None else getattr(module, self.bias).detach(),
            n_group=self.n_group,
            topk_group=self.topk_group,
            group_score=self.group_score,
            eps=self.eps,
            scale=self.scale,
            weights_dtype=self.weights_dtype,
        )


class _LogitsReached(Exception):
    """Leaves a router's forward with its logits."""

    def __init__(self, logits: Tensor):
        self.logits = logits


class _Tap(TorchFunctionMode):
    """Notes the results of torch functions, or stops at the one that returns the logits."""

    def __init__(self, stop_at: int | None = None):
        super().__init__()
        self.stop_at = stop_at
        self.results: list[Any] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if len(self.results) == self.stop_at:
            raise _LogitsReached(result)
        self.results.append(result if self.stop_at is None else None)
        return result


@dataclass
class GatedRouter(Router):
    """
    A [`Router`] that replays through [`masked_topk_gating`].

    Args:
        formula ([`GateFormula`]):
            Its gate.
    """

    formula: GateFormula

    def run(
        self, forward: Callable, args: tuple, kwargs: dict[str, Any], replayed_NK: Tensor | None, missing: int
    ) -> tuple[Any, Tensor]:
        """As in [`Router`]; without a record the router's own forward runs."""
        if replayed_NK is None:
            return self.intercept(forward, args, kwargs, replayed_NK, missing)
        logits = self._logits(forward, args, kwargs)
        logits_NE = logits.reshape(-1, self.num_experts)
        gate = self.formula(self.module, logits_NE, self.top_k, replayed_NK)
        live = self.formula(self.module, logits_NE.detach(), self.top_k, None)
        return (logits, gate.weights, gate.expert_ids), live.expert_ids

    def _logits(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        try:
            with _Tap(self.formula.logits_call):
                forward(*args, **kwargs)
        except _LogitsReached as reached:
            if reached.logits.shape[-1] == self.num_experts:
                return reached.logits
        raise RuntimeError(
            f"{self.name} ({type(self.module).__name__}) does not return its logits from call "
            f"{self.formula.logits_call + 1} any more, as it did when it was found. Attach again after whatever "
            "changed the module, or with `gating='intercept'`."
        )


def with_gating_op(
    router: Router, args: tuple, kwargs: dict[str, Any], likely: GateFormula | None = None
) -> GatedRouter | None:
    """
    Find arguments with which the op equals the gate of a router, on its own selection and on a foreign one.

    Args:
        router ([`Router`]):
            A router that has passed its check.
        args, kwargs:
            Arguments that its forward was called with.
        likely ([`GateFormula`], *optional*):
            What to try first: the formula of the layer before.

    Returns:
        [`GatedRouter`], or `None` where the op does not cover the gate.
    """
    with torch.no_grad(), _Tap() as tap:
        output = router.module.forward(*args, **kwargs)
    if not (isinstance(output, tuple) and len(output) == 3 and router.ids_output == 2 and output[0].ndim == 2):
        return None
    calls = [i for i, result in enumerate(tap.results) if result is output[0]]
    if not calls or output[0].shape[1] != router.num_experts or output[1].shape != output[2].shape:
        return None
    own_NK = output[2]
    foreign_NK = (own_NK + 1) % router.num_experts
    with torch.no_grad():
        expected = router.run(router.module.forward, args, kwargs, foreign_NK, missing=-1)[0][1]
    candidates = _candidates(router.module, router.num_experts, calls[0], output[1].dtype)
    for formula in chain([likely] if likely else [], candidates):
        try:
            live = formula(router.module, output[0], router.top_k, None)
            replayed = formula(router.module, output[0], router.top_k, foreign_NK)
        except (TypeError, ValueError):  # groups that do not divide E, say
            continue
        same_ids = torch.equal(live.expert_ids.sort(-1).values, own_NK.sort(-1).values)
        own = formula(router.module, output[0], router.top_k, own_NK)
        if same_ids and _close(own.weights, output[1]) and _close(replayed.weights, expected):
            return GatedRouter(**vars(router), formula=formula)
    return None


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = _TOLERANCE[other.dtype]
    return torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance * 1e-3)


def _candidates(module: nn.Module, num_experts: int, logits_call: int, dtype: torch.dtype) -> Iterator[GateFormula]:
    # a bias that is still zero would go unnoticed, so buffers come first
    biases: list[str | None] = [
        name for name, buffer in module.named_buffers(recurse=False) if buffer.shape == (num_experts,)
    ]
    biases.append(None)
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
        yield GateFormula(logits_call, bias, score, renormalize, eps, scale, *group, weights_dtype=dtype)
