"""The public function: `torch.compile`, any layout of its arguments, and what its backward does not reach."""

import shutil

import pytest
import torch
from gating_oracle import Case

from trl_r3.gating import masked_topk_gating


@pytest.mark.parametrize(
    ("score", "backend"), [("softmax", "aot_eager"), ("sigmoid", "aot_eager"), ("softmax", "inductor")]
)
def test_compiles_into_one_graph(score, backend, monkeypatch, tmp_path):
    if backend == "inductor" and shutil.which("c++") is None:
        pytest.skip("inductor needs a C++ compiler (c++), which is not on this machine")
    torch.compiler.reset()
    # The key of a graph on disk does not tell ops of one name apart.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    case = Case()

    def step(logits, recorded):
        out = masked_topk_gating(logits * 2, 4, recorded, score=score)
        return out.weights.square().sum(), out.expert_ids, out.status

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for num_tokens in (24, 17):
        results = []
        for run in (step, compiled):
            logits = case.logits()[:num_tokens].requires_grad_()
            loss, ids, status = run(logits, case.recorded()[:num_tokens])
            loss.backward()
            results.append((loss.detach(), ids, status, logits.grad))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(eager, graph)


def test_any_layout_and_no_rows(gating):
    logits = torch.randn(16, 5).t()
    recorded = torch.stack([torch.randperm(16)[:8] for _ in range(5)])[:, ::2]
    assert not logits.is_contiguous()
    assert not recorded.is_contiguous()
    strided = gating(logits, 4, recorded)
    packed = gating(logits.contiguous(), 4, recorded.contiguous())
    assert torch.equal(strided.weights, packed.weights)
    assert torch.equal(strided.expert_ids, packed.expert_ids)
    leaf = torch.zeros(0, 16, requires_grad=True)
    empty = gating(leaf, 4, recorded[:0])
    assert empty.weights.shape == empty.expert_ids.shape == (0, 4)
    assert empty.status.shape == (0,)
    empty.weights.sum().backward()
    assert leaf.grad.shape == (0, 16)


def test_an_expanded_gradient_and_another_weights_dtype(gating):
    leaf = torch.randn(6, 32).bfloat16().requires_grad_()
    out = gating(leaf, 4, renormalize=False, weights_dtype=torch.float32)
    assert out.weights.dtype == torch.float32
    out.weights.sum().backward()
    assert leaf.grad.dtype == torch.bfloat16
    expected = torch.softmax(leaf.detach().float(), -1).gather(1, out.expert_ids)
    torch.testing.assert_close(out.weights.detach(), expected)


def test_bias_receives_no_gradient():
    logits, bias = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    out = masked_topk_gating(logits, 2, score="sigmoid", bias=bias)
    assert not out.expert_ids.requires_grad
    assert not out.status.requires_grad
    out.weights.square().sum().backward()
    assert bias.grad is None
    assert logits.grad is not None


def test_the_second_derivative_is_refused():
    logits = torch.randn(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(masked_topk_gating(logits, 2).weights.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
