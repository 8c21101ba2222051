"""Loading compiled kernels: what does not load costs one warning, and importing compiles nothing."""

import subprocess
import sys

import pytest
import torch

from trl_r3.gating import masked_topk_gating, native_kernels
from trl_r3.gating.native import MARKER, OPS_VERSION, load_native_kernels


def test_an_extension_that_does_not_load_costs_one_warning(tmp_path):
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"no library" + MARKER)
    before = native_kernels()
    with pytest.warns(RuntimeWarning, match="cannot be loaded with torch") as caught:
        load_native_kernels(broken)
    assert [warning.filename for warning in caught] == [__file__]
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
