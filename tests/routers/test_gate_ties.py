"""Gates whose logits tie are those that the op computes, and wrong formulas do not pass as ties."""

import contextlib
from functools import partial

import pytest
import torch
from model_zoo import build_tiny
from routers.wrong_gradients import with_gradient_times
from torch import nn

from trl_r3 import RouterReplay, UnsupportedRouterError
from trl_r3.routers import gated
from trl_r3.routers.gate_formula import GateFormula
from trl_r3.routers.gate_ties import same_but_for_ties
from trl_r3.routers.gated import GatedRouter

EXPERTS, TOP_K = 128, 8
LOGITS = torch.tensor([[4.0, 3.0, 3.0, 1.0], [0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])
OWN = torch.tensor([[0, 1], [2, 3], [1, 0]])
TIED = torch.tensor([[0, 2], [3, 2], [0, 1]])
OTHER = torch.tensor([[0, 3], [3, 2], [0, 1]])


def many_experts():
    shape = {"num_hidden_layers": 6, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "hidden_size": 64}
    return build_tiny("qwen3_moe", **shape)


NUMERICS = {
    "float32": (torch.float32, contextlib.nullcontext),
    "bfloat16": (torch.bfloat16, contextlib.nullcontext),
    "autocast": (torch.float32, lambda: torch.autocast("cpu", torch.bfloat16)),
}


@pytest.mark.parametrize(("dtype", "numerics"), NUMERICS.values(), ids=NUMERICS)
def test_gates_of_many_experts_are_covered(dtype, numerics):
    """With so many layers one of them ties in any model, which must not keep the op from it."""
    model = many_experts().to(dtype)
    with numerics(), RouterReplay(model, gating="op") as replay:
        assert [type(router) for router in replay.routers] == [GatedRouter] * len(replay.moe_layers)
        assert {router.formula.score for router in replay.routers} == {"softmax"}


def equal_sets(one_NK, other_NK, *context):
    return torch.equal(one_NK.sort(-1).values, other_NK.sort(-1).values)


@pytest.mark.parametrize("numerics", ["bfloat16"])
def test_without_regard_to_ties_they_are_not(monkeypatch, numerics):
    dtype, around = NUMERICS[numerics]
    model = many_experts().to(dtype)
    monkeypatch.setattr(gated, "same_but_for_ties", equal_sets)
    with around(), pytest.raises(UnsupportedRouterError, match="does not cover its gate"):
        RouterReplay(model, gating="op")


@pytest.mark.parametrize(
    "bent", [lambda weights: 1.05 * weights, partial(with_gradient_times, 1.05)], ids=["weights", "gradients"]
)
def test_a_gate_that_is_off_is_refused_in_bfloat16_too(monkeypatch, bent):
    model = many_experts().bfloat16()
    gates = type(next(module for name, module in model.named_modules() if name.endswith("mlp.gate")))
    own = gates.forward

    def forward(self, hidden_states):
        logits, weights, ids = own(self, hidden_states)
        return logits, bent(weights), ids

    monkeypatch.setattr(gates, "forward", forward)
    with pytest.raises(UnsupportedRouterError, match="does not cover"):
        RouterReplay(model, gating="op")


def formula(bias=None, n_group=1):
    return GateFormula(False, bias, "sigmoid", True, 1e-20, 1.0, n_group, 1, "max", torch.float32)


def router(**buffers):
    module = nn.Module()
    for name, value in buffers.items():
        module.register_buffer(name, value)
    return module


def test_experts_that_tie_are_worth_the_same():
    assert same_but_for_ties(OWN, OWN, formula(), router(), LOGITS)
    assert same_but_for_ties(TIED, OWN, formula(), router(), LOGITS)
    assert not same_but_for_ties(OTHER, OWN, formula(), router(), LOGITS)


def test_a_bias_is_looked_at():
    """Experts of one logit are not worth the same where a bias selects."""
    even, uneven = router(bias=torch.zeros(4)), router(bias=torch.tensor([0.0, 0.1, 0.2, 0.0]))
    assert same_but_for_ties(TIED, OWN, formula("bias"), even, LOGITS)
    assert not same_but_for_ties(TIED, OWN, formula("bias"), uneven, LOGITS)


def test_logits_that_say_nothing_excuse_nothing():
    assert not same_but_for_ties(TIED, OWN, formula(n_group=2), router(), LOGITS)
    assert not same_but_for_ties((OWN + 1) % 4, OWN, formula(), router(), torch.zeros(3, 4))
