"""The op as PyTorch sees it: schema and fakes, torch.compile, layouts, bad input."""

import shutil
import subprocess
import sys

import pytest
import torch
from gating_oracle import Case, cases

from trl_r3.gating import masked_topk_gating, masked_topk_gating_ref, native_kernels
from trl_r3.gating.native import MARKER, OPS_VERSION, load_native_kernels

TWINS = {"op": masked_topk_gating, "ref": masked_topk_gating_ref}


@pytest.fixture(params=TWINS)
def gating(request):
    return TWINS[request.param]


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


X = torch.zeros(3, 8)
IDS = torch.zeros(3, 2, dtype=torch.int64)
BAD = [
    (ValueError, "must be .T, E., got 3 dimensions", lambda f: f(torch.zeros(1, 3, 8), 2)),
    (TypeError, "router_logits is torch.int64", lambda f: f(X.long(), 2)),
    (ValueError, "top_k is 9, but there are 8", lambda f: f(X, 9)),
    (ValueError, "top_k is 0", lambda f: f(X, 0)),
    (ValueError, "top_k is 1, but there are 0", lambda f: f(X[:, :0], 1)),
    (ValueError, "recorded is .2, 2., expected .3, 2.", lambda f: f(X, 2, IDS[:2])),
    (ValueError, "recorded is .3, 2., expected .3, 3.", lambda f: f(X, 3, IDS)),
    (TypeError, "recorded is torch.float32", lambda f: f(X, 2, IDS.float())),
    (TypeError, "recorded is uint8.*256 experts", lambda f: f(torch.zeros(3, 256), 2, IDS.to(torch.uint8))),
    (ValueError, "recorded is on meta", lambda f: f(X, 2, IDS.to("meta"))),
    (ValueError, "score is 'tanh'", lambda f: f(X, 2, score="tanh")),
    (ValueError, "group_score is 'mean'", lambda f: f(X, 2, group_score="mean")),
    (ValueError, "8 experts cannot be split into n_group=3", lambda f: f(X, 2, n_group=3)),
    (ValueError, "topk_group is 3, but n_group is 2", lambda f: f(X, 2, n_group=2, topk_group=3)),
    (ValueError, "hold 2, fewer than top_k=3", lambda f: f(X, 3, n_group=4, topk_group=1)),
    (ValueError, "needs 2 experts a group, got 1", lambda f: f(X, 1, n_group=8, topk_group=2)),
    (ValueError, "bias is .7,.", lambda f: f(X, 2, bias=torch.zeros(7))),
    (TypeError, "bias is torch.int64", lambda f: f(X, 2, bias=torch.zeros(8, dtype=torch.int64))),
    (ValueError, "eps is -1", lambda f: f(X, 2, eps=-1.0)),
    (TypeError, "weights_dtype is torch.int32", lambda f: f(X, 2, weights_dtype=torch.int32)),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[m for _, m, _ in BAD])
def test_bad_input_is_named(gating, error, message, call):
    with pytest.raises(error, match=message):
        call(gating)


def test_an_extension_that_does_not_load_costs_one_warning(tmp_path):
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"no library" + MARKER)
    before = native_kernels()
    with pytest.warns(RuntimeWarning, match="cannot be loaded with torch") as caught:
        load_native_kernels(broken)
    assert len(caught) == 1
    assert native_kernels() == before
    load_native_kernels(tmp_path / "absent.so")


VERSION_1 = """
trl_r3::gating_forward(Tensor logits, int top_k, Tensor? recorded, Tensor? bias, int score, bool renormalize,
 int n_group, int topk_group, bool group_max, float eps, float scale, ScalarType weights_dtype, bool compare_live)
 -> (Tensor weights, Tensor expert_ids, Tensor status)
trl_r3::gating_backward(Tensor grad_weights, Tensor logits, Tensor expert_ids, int score, bool renormalize,
 float eps, float scale) -> Tensor
"""


def test_another_schema_needs_another_version():
    schemas = [str(op.default._schema) for op in (torch.ops.trl_r3.gating_forward, torch.ops.trl_r3.gating_backward)]
    expected = VERSION_1.replace("\n ", " ").split("\n")[1:3]
    assert (OPS_VERSION, schemas) == (1, expected), "raise OPS_VERSION, here and in native.py and gating_cpu.cpp"


def test_import_compiles_nothing_and_reads_no_environment():
    probe = (
        "import os, subprocess, sys\n"
        "import torch\n"
        "subprocess.Popen.__init__ = None\n"
        "os.environ = None\n"
        "import trl_r3.gating as g\n"
        "g.masked_topk_gating(torch.zeros(2, 4), 2)\n"
        "assert 'torch.utils.cpp_extension' not in sys.modules\n"
    )
    package = masked_topk_gating.__module__.split(".")[0]
    root = sys.modules[package].__path__[0].rsplit("/", 1)[0]
    stub = f"import sys, types; m = types.ModuleType('{package}'); m.__path__ = ['{root}/{package}']\n"
    stub += f"sys.modules['{package}'] = m\n"
    subprocess.run([sys.executable, "-c", stub + probe], check=True, timeout=120)
