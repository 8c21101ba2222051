"""The row programs of the CUDA kernels, run on the host with their lanes in step, under a timeout."""

import ctypes
import multiprocessing
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from gating_oracle import TOLERANCE, Case, TiedRecord, cases, check_case

from trl_r3.gating import GatingOutput, masked_topk_gating_ref

CSRC = Path(__file__).parents[2] / "trl_r3" / "gating" / "csrc"
REALS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
IDS = [torch.uint8, torch.int16, torch.int32, torch.int64]
SCORES = ["softmax", "topk_softmax", "sigmoid", "sqrtsoftplus"]
CASES = [case for case in cases() if case.dtype != torch.float64]
FAST = [
    case
    for case in [*CASES, *(case.but(dtype=torch.bfloat16, num_experts=32) for case in CASES[:16])]
    if case.dtype != torch.float32
    and case.num_experts % 32 == 0
    and case.top_k <= 16
    and not case.with_bias
    and case.all_options()["n_group"] == 1
]


class Problem(ctypes.Structure):
    _fields_ = (
        [("num_tokens", ctypes.c_int64)]
        + [(name, ctypes.c_int32) for name in ("logit_type", "weights_type", "id_type", "score", "renormalize")]
        + [("eps", ctypes.c_float), ("scale", ctypes.c_float)]
        + [(name, ctypes.c_int32) for name in ("num_experts", "top_k", "n_group", "topk_group")]
        + [(name, ctypes.c_int32) for name in ("group_max", "compare_live")]
        + [
            (name, ctypes.c_void_p)
            for name in ("logits", "recorded", "bias", "weights", "expert_ids", "status", "grad_logits")
        ]
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler (c++) on this machine")
    target = tmp_path_factory.mktemp("lockstep") / "lockstep.so"
    source = Path(__file__).with_name("lockstep.cpp")
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", f"-I{CSRC}"]
    subprocess.run(["c++", *flags, str(source), "-o", str(target)], check=True, timeout=120)
    return ctypes.CDLL(str(target))


def in_child(function, *arguments, seconds=60):
    """Call `function` in a forked process, so that a loop without end fails a test instead of stopping all of them."""
    child = multiprocessing.get_context("fork").Process(target=lambda: exit(function(*arguments) != 1))
    child.start()
    child.join(seconds)
    if child.is_alive():
        child.kill()
        raise AssertionError(f"the lanes did not finish within {seconds} s")
    assert child.exitcode == 0, "the lanes diverged" if child.exitcode == 1 else f"exit code {child.exitcode}"


def problem(logits, top_k, expert_ids, weights, options, **tensors):
    tensors = {"logits": logits, "expert_ids": expert_ids, "weights": weights, **tensors}
    return Problem(
        num_tokens=logits.shape[0],
        logit_type=REALS.index(logits.dtype),
        weights_type=REALS.index(weights.dtype),
        id_type=IDS.index(tensors["recorded"].dtype) if tensors.get("recorded") is not None else 3,
        score=SCORES.index(options["score"]),
        renormalize=options["renormalize"],
        eps=options["eps"],
        scale=options["scale"],
        num_experts=logits.shape[1],
        top_k=top_k,
        n_group=options["n_group"],
        topk_group=options["topk_group"],
        group_max=options["group_score"] == "max",
        compare_live=options["compare_live"],
        **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
    )


def lockstep_gating(library, fast):
    def gating(logits, top_k, recorded, **options):
        num_tokens = logits.shape[0]
        weights = torch.zeros(num_tokens, top_k, dtype=logits.dtype).share_memory_()
        expert_ids = torch.zeros(num_tokens, top_k, dtype=torch.int64).share_memory_()
        status = torch.full((num_tokens,), 7, dtype=torch.uint8).share_memory_()
        recorded = None if recorded is None else recorded.contiguous()
        bias = None if options["bias"] is None else options["bias"].float()
        case = problem(logits, top_k, expert_ids, weights, options, recorded=recorded, bias=bias, status=status)
        in_child(library.lockstep_forward, ctypes.byref(case), int(fast))
        return GatingOutput(weights, expert_ids, status)

    return gating


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_warp_gates_a_row(library, case):
    check_case(lockstep_gating(library, fast=False), case)


@pytest.mark.parametrize("case", FAST, ids=str)
def test_four_lanes_gate_a_row_of_16_bit_logits(library, case):
    check_case(lockstep_gating(library, fast=True), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fast", [False, True])
def test_ties_zeros_and_special_values(library, fast, dtype):
    class Special(Case):
        def logits(self):
            x = super().logits()
            x = (x * 2).round() / 2
            x[::3, 5], x[1::3, 7] = -0.0, float("-inf")
            return x

    check_case(lockstep_gating(library, fast), Special(48, 64, 8, dtype, options={"renormalize": False}))
    check_case(lockstep_gating(library, fast), TiedRecord(48, 64, 6, dtype))
    row = torch.zeros(1, 32, dtype=dtype)
    row[0, 3], row[0, 9], row[0, 1] = float("nan"), float("-nan"), float("inf")
    defaults = Case().all_options()
    assert lockstep_gating(library, fast)(row, 5, None, **defaults).expert_ids.tolist() == [[3, 9, 1, 0, 2]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eight_lanes_take_a_row_back(library, case):
    logits, options = case.logits(), case.all_options()
    leaf = logits.clone().requires_grad_()
    out = masked_topk_gating_ref(leaf, case.top_k, case.recorded(), **options)
    upstream = torch.randn(out.weights.shape, generator=torch.Generator().manual_seed(9)).to(case.dtype)
    (expected,) = torch.autograd.grad(out.weights, leaf, upstream)
    grad = torch.full_like(logits, 7.0).share_memory_()
    backward = problem(logits, case.top_k, out.expert_ids, upstream, options, grad_logits=grad)
    in_child(library.lockstep_backward, ctypes.byref(backward))
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(grad.double(), expected.double(), rtol=tolerance, atol=tolerance / 2)


def test_lanes_that_part_are_noticed(library):
    in_child(library.lockstep_notices_divergence)


def test_a_loop_without_end_is_noticed():
    def forever():
        while True:
            pass

    with pytest.raises(AssertionError, match="did not finish within 0.2 s"):
        in_child(forever, seconds=0.2)
