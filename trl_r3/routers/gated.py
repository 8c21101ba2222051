"""Routers whose gate `masked_topk_gating` computes: a product with their weight, and the op.

Legend: N tokens of a forward (B * T), E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._compat import drops_out
from ..gating.reference import expert_scores
from .gate_formula import GateFormula, candidates, selection_biases
from .gate_ties import same_but_for_ties
from .router import Routed, Router

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass
class GatedRouter(Router):
    """
    A [`Router`] that replays through [`masked_topk_gating`].

    Args:
        formula ([`GateFormula`]):
            Its gate.
        numerics (`tuple`):
            The dtypes of input, weight and autocast that the formula was found with. With others the router's own code
            may compute otherwise, and its selection is intercepted.
    """

    formula: GateFormula = field(kw_only=True)
    numerics: tuple[torch.dtype | None, ...] = field(kw_only=True)
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self):
        self.settings = _settings(self.module)

    def check_unchanged(self) -> None:
        """
        The formula was found for the settings that the router had.

        Raises:
            `RuntimeError`: If one of them has been changed since.
        """
        for name, value in _settings(self.module).items():
            before = self.settings.get(name, value)
            if before != value:
                raise RuntimeError(
                    f"`{name}` of {self.name} is {value!r}, but was {before!r} when replay was "
                    "attached, and `masked_topk_gating` computes the gate of that time. Attach again, or attach with "
                    "`gating='intercept'`."
                )

    def replay(
        self,
        forward: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        replayed_NK: Tensor,
        missing_N1: Tensor | None = None,
        compare: bool = True,
    ) -> Routed:
        """As in [`Router`], with `status_N`; the op sees by itself which rows are missing."""
        if _numerics(self.module, args[0]) != self.numerics:
            return super().replay(forward, args, kwargs, replayed_NK, missing_N1, compare)
        logits_NE = self.formula.logits(self.module, args[0])
        self.check_tokens(logits_NE.shape[0], replayed_NK.shape[0])
        gate = self.formula(self.module, logits_NE, self.top_k, replayed_NK, compare)
        return Routed(
            (logits_NE, gate.weights, gate.expert_ids), None, gate.status if compare else None, gate.expert_ids
        )

    def live_ids(self, routed: Routed, rows_M: Tensor) -> Tensor:
        """As in [`Router`]; the op has only told whether they differ."""
        if routed.live_NK is not None:
            return super().live_ids(routed, rows_M)
        logits_NE = routed.output[0]
        return self.formula(self.module, logits_NE.detach()[rows_M], self.top_k, None).expert_ids

    def log_scores(self, routed: Routed, ids_NK: Tensor) -> Tensor:
        """(N, K) logarithms of the scores that a replaying forward gave some experts, before bias and groups."""
        log_scores_NE = _log_scores(routed.output[0].detach(), self.formula.score)
        return log_scores_NE.gather(1, ids_NK.long().clamp(0, self.num_experts - 1))  # a missing row has no ids


def _settings(module: nn.Module) -> dict[str, Any]:
    """The numbers, flags and words of a router, which its gate may depend on."""
    kinds = (bool, int, float, str)
    own = {name: value for name, value in vars(module).items() if isinstance(value, kinds) and name[0] != "_"}
    own.pop("training", None)  # `train()` and `eval()` set it, and a gate that reads it is not covered
    return own


def _numerics(module: nn.Module, hidden: Tensor) -> tuple[torch.dtype | None, ...]:
    """In which dtypes a gate computes."""
    on, weight = hidden.device.type, module.weight
    cast = torch.get_autocast_dtype(on) if torch.is_autocast_enabled(on) else None
    return hidden.dtype, weight.dtype, cast  # type: ignore[return-value, union-attr]


def _log_scores(logits_NE: Tensor, score: str) -> Tensor:
    """(N, E) logarithms of router scores, in float32. Where the gate is a softmax over K logits: of one over all."""
    logits_NE = logits_NE.float()
    if score in ("softmax", "topk_softmax"):
        return F.log_softmax(logits_NE, dim=-1)
    if score == "sigmoid":
        return F.logsigmoid(logits_NE)
    return expert_scores(logits_NE, score).log()


def with_gating_op(
    router: Router, forward: Callable, args: tuple, kwargs: dict[str, Any], likely: GateFormula | None = None
) -> GatedRouter | None:
    """
    Find arguments with which the op equals the gate of a router, on its own selection and on a foreign one: weights,
    ids (but for ties), and the gradients of its inputs and parameters.

    Args:
        router ([`Router`]):
            A router that has passed its check.
        forward (`Callable`):
            Its own forward.
        args, kwargs:
            Arguments that its forward was called with.
        likely ([`GateFormula`], *optional*):
            What to try first: the formula of the layer before.

    Returns:
        [`GatedRouter`], or `None` where the op does not cover the gate.
    """
    settings = _settings(router.module)
    with torch.no_grad():
        output = forward(*args, **kwargs)
    if _settings(router.module) != settings:  # it counts, say
        return None
    if not (isinstance(output, tuple) and len(output) == 3 and router.ids_output == 2 and output[0].ndim == 2):
        return None
    logits_NE, weights_NK, own_NK = output
    if logits_NE.shape[1] != router.num_experts or weights_NK.shape != own_NK.shape:
        return None
    in_float32 = _product(router, forward, args, logits_NE)
    if in_float32 is None:
        return None
    biases = selection_biases(router, forward, args, kwargs, output)
    if biases is None:
        return None
    foreign_NK = (own_NK + 1) % router.num_experts
    try:
        expected = _gradients(router, forward, args, kwargs, foreign_NK)
    except RuntimeError:  # a gate that is detached has none
        return None
    formulas = candidates(router.module, router.num_experts, biases, in_float32, weights_NK.dtype)
    for formula in chain([likely] if likely and likely.bias in biases else [], formulas):
        gated = GatedRouter(**vars(router), formula=formula, numerics=_numerics(router.module, args[0]))
        try:
            with torch.no_grad():
                live = formula(router.module, logits_NE, router.top_k, None)
                own = formula(router.module, logits_NE, router.top_k, own_NK)
        except (TypeError, ValueError):  # groups that do not divide E, say
            continue
        if not same_but_for_ties(live.expert_ids, own_NK, formula, router.module, logits_NE):
            continue
        if not _close(own.weights, weights_NK):
            continue
        try:
            replayed = _gradients(gated, forward, args, kwargs, foreign_NK)
        except RuntimeError:  # a product out of autograd's sight has none
            continue
        gradients = zip(replayed[1:], expected[1:], strict=True)
        if _close(replayed[0], expected[0]) and all(_close_gradient(*pair, logits_NE.dtype) for pair in gradients):
            return gated
    return None


def _product(router: Router, forward: Callable, args: tuple, logits_NE: Tensor) -> bool | None:
    """Whether the logits are a float32 product of the input, or one in its own dtype; `None` if they are neither."""
    module, code = router.module, getattr(getattr(forward, "__func__", None), "__code__", None)
    weight = getattr(module, "weight", None)
    within = [child for child in module.modules() if child is not module]
    if code is None or "training" in code.co_names or any(_is_unknown(child) for child in within):
        return None  # what else it does to its input, or does in training, is not known
    if not args or not torch.is_tensor(args[0]) or not torch.is_tensor(weight) or weight.ndim != 2:
        return None
    for in_float32 in (False, True):
        formula = next(candidates(module, router.num_experts, [None], in_float32, logits_NE.dtype))
        try:
            with torch.no_grad():
                logits = formula.logits(module, args[0])
        except RuntimeError:  # of another size, or of two dtypes
            continue
        if logits.dtype == logits_NE.dtype and torch.equal(logits, logits_NE):
            return in_float32
    return None


def _is_unknown(child: nn.Module) -> bool:
    return drops_out(child) or any(True for _ in chain(child.parameters(), child.buffers()))


def _gradients(
    router: Router, forward: Callable, args: tuple, kwargs: dict[str, Any], ids_NK: Tensor
) -> tuple[Tensor, ...]:
    """Weights of a given selection, and the gradients of the router's inputs and parameters from them."""
    with torch.enable_grad():
        leaves = [
            arg.detach().requires_grad_() if torch.is_tensor(arg) and arg.is_floating_point() else arg for arg in args
        ]
        inputs = [leaf for leaf, arg in zip(leaves, args, strict=True) if leaf is not arg]
        inputs += [parameter for parameter in router.module.parameters() if parameter.requires_grad]
        weights_NK = router.replay(forward, tuple(leaves), kwargs, ids_NK, None, False).output[1]
        generator = torch.Generator(weights_NK.device).manual_seed(0)
        weighting = torch.randn(weights_NK.shape, generator=generator, device=weights_NK.device, dtype=torch.float32)
        gradients = torch.autograd.grad(
            weights_NK, inputs, weighting.to(weights_NK.dtype), allow_unused=True, materialize_grads=True
        )
    return (weights_NK.detach(), *gradients)


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = _TOLERANCE[other.dtype]
    return torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance * 1e-3)


def _close_gradient(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    # sums over many tokens, of values that are rounded as the logits are: their rounding is that of the largest
    one, other = one.double(), other.double()
    scale = float(other.abs().max()) if other.numel() else 0.0
    return bool(((one - other).abs() <= max(_TOLERANCE[dtype], 1e-3) * scale + 1e-12).all())
