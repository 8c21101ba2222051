"""The CUDA extension compiles, links, loads and registers its kernels on a machine without a GPU."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from gating_build import copy_source, environment, run

PROBE = """
import torch
import trl_r3.gating as g
logits = torch.randn(8, 32)
assert torch.equal(g.masked_topk_gating(logits, 4).expert_ids, g.masked_topk_gating_ref(logits, 4).expert_ids)
print(*g.native_kernels())
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The build's output, and a folder from which the package with its kernels is imported."""
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("no nvcc on this machine: it is neither on PATH nor in /usr/local/cuda/bin")
    source = copy_source(tmp_path_factory.mktemp("source"))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    log = run(command, cwd=source, env={**os.environ, "TRL_R3_BUILD": "cuda"}, timeout=400)
    (source / "trl_r3" / "__init__.py").write_text("")
    return log, source


def test_every_kernel_is_compiled_for_both_architectures_and_spills_nothing(build):
    log, _ = build
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", log)
    architectures = [architecture for _, architecture in kernels]
    assert architectures.count("sm_80") == architectures.count("sm_90") >= 10
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(memory) == len(kernels)
    assert set(memory) == {("0", "0", "0")}


def test_the_compilers_have_nothing_to_say(build):
    log, _ = build
    csrc = [line for line in log.splitlines() if "warning" in line and "csrc" in line]
    assert not csrc, csrc


def test_it_loads_and_registers_without_a_gpu(build):
    _, source = build
    assert run([sys.executable, "-c", PROBE], env=environment(source), cwd=source, timeout=120).split() == [
        "cpu",
        "cuda",
    ]
