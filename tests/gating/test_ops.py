"""The raw ops: schema and fakes; the backward against differences and against autograd through the reference."""

import pytest
import torch
from gating_oracle import TOLERANCE, Case, cases

from trl_r3.gating import masked_topk_gating, masked_topk_gating_ref


def raw_arguments(case):
    options = case.all_options()
    score = ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus").index(options["score"])
    formula = (score, options["renormalize"], options["eps"], options["scale"])
    select = (options["n_group"], options["topk_group"], options["group_score"] == "max")
    recorded = None if case.ids is None else case.recorded().contiguous()
    forward = (case.logits(), case.top_k, recorded, options["bias"], *formula[:2], *select, *formula[2:])
    return (*forward, case.dtype, options["compare_live"]), formula


@pytest.mark.parametrize("case", cases()[::5], ids=str)
def test_opcheck(case):
    arguments, formula = raw_arguments(case)
    torch.library.opcheck(torch.ops.trl_r3.gating_forward.default, arguments)
    weights, ids, _ = torch.ops.trl_r3.gating_forward(*arguments)
    torch.library.opcheck(torch.ops.trl_r3.gating_backward.default, (weights, arguments[0], ids, *formula))


def gradient(gating, case, logits):
    leaf = logits.clone().requires_grad_()
    out = gating(leaf, case.top_k, case.recorded(), **case.all_options())
    upstream = torch.randn(out.weights.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (grad,) = torch.autograd.grad(out.weights, leaf, upstream.to(out.weights.dtype))
    return grad


@pytest.mark.parametrize("case", cases(), ids=str)
def test_twins_have_one_gradient(case):
    logits = case.logits()
    got, expected = gradient(masked_topk_gating, case, logits), gradient(masked_topk_gating_ref, case, logits)
    assert got.dtype == logits.dtype
    # Autograd rounds 16-bit gradients once per use of a logit, the formula once per logit.
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance / 2)


@pytest.mark.parametrize("eps", [0.0, 0.3])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid", "sqrtsoftplus"])
def test_gradcheck(score, renormalize, eps):
    case = Case(num_tokens=6, num_experts=9, top_k=3, dtype=torch.float64)

    def weights(logits):
        return masked_topk_gating(
            logits, 3, case.recorded(), score=score, renormalize=renormalize, eps=eps, scale=1.5
        ).weights

    assert torch.autograd.gradcheck(weights, case.logits().requires_grad_())


def test_outside_the_record_the_gradient_is_exactly_zero():
    case = Case(missing=0.0, invalid=0.0)
    outside = torch.ones(24, 16).scatter(1, case.recorded(), 0.0).bool()
    for score in ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus"):
        grad = gradient(masked_topk_gating, case.but(options={"score": score}), case.logits())
        assert (grad[outside] == 0).all()
        assert (grad[~outside] != 0).all()


def test_one_renormalized_expert_has_no_gradient():
    grad = gradient(masked_topk_gating, Case(top_k=1), Case().logits())
    assert (grad == 0).all()
    dense = gradient(masked_topk_gating, Case(top_k=1, options={"renormalize": False}), Case().logits())
    assert (dense != 0).all()
