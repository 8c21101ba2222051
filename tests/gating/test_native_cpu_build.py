"""The CPU extension, installed the way the documentation says, passes the tests of the op."""

import os
import runpy
import shutil
import sys

import pytest
import setuptools
from gating_build import ROOT, TESTS, copy_source, environment, run

from trl_r3.gating.native import MARKER


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the installed package and its CPU kernels."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler (c++) on this machine")
    source, target = copy_source(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    run([*pip, "--no-index", "--target", target, source], env={**os.environ, "TRL_R3_BUILD": "cpu"}, timeout=300)
    # The tests need this part alone, and the rest of the package takes seconds to import.
    (target / "trl_r3" / "__init__.py").write_text("")
    return target


def test_the_wheel_carries_one_binary_for_all_pythons(site):
    assert (site / "trl_r3/gating/_C.abi3.so").exists()
    (info,) = site.glob("trl_r3-*.dist-info")
    assert "cp311-abi3-" in (info / "WHEEL").read_text()
    assert {p.name for p in (ROOT / "trl_r3/gating/csrc").iterdir()} <= {
        p.name for p in (site / "trl_r3/gating/csrc").iterdir()
    }


def test_only_the_stable_abi_is_linked(site):
    if shutil.which("nm") is None:
        pytest.skip("no nm (binutils) on this machine")
    names = run(["nm", "-D", "--undefined-only", str(site / "trl_r3/gating/_C.abi3.so")]).split()
    torch_names = [name for name in names if "torch" in name or "c10" in name or "2at" in name]
    assert torch_names
    assert all(name.startswith(("aoti_torch_", "torch_")) for name in torch_names), torch_names


def test_the_kernels_are_registered(site):
    probe = "import trl_r3.gating as g; print(g.__file__, *g.native_kernels())"
    path, *kernels = run([sys.executable, "-c", probe], env=environment(site), cwd=site, timeout=120).split()
    assert path.startswith(str(site))
    assert kernels == ["cpu"]


FILES = ["test_reference.py", "test_contract.py", "test_masked_topk.py", "test_ops.py", "test_native.py"]


def test_the_kernels_pass_the_tests_of_the_op(site):
    files = [str(TESTS / file) for file in FILES]
    pytest_run = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    passed = run(pytest_run, env=environment(site), cwd=site, timeout=600)
    assert "skipped" not in passed


STALE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import trl_r3.gating as g
(warning,) = (w for w in caught if issubclass(w.category, RuntimeWarning))
assert "were built for another version of the op" in str(warning.message), warning.message
assert "TRL_R3_BUILD=cpu|cuda pip install --no-build-isolation" in str(warning.message), warning.message
assert g.native_kernels() == ()
import torch
logits, recorded = torch.randn(8, 32), torch.arange(32).view(8, 4) - 1
got, expected = g.masked_topk_gating(logits, 4, recorded), g.masked_topk_gating_ref(logits, 4, recorded)
assert all(map(torch.equal, got, expected))
"""


@pytest.mark.parametrize("marker", [MARKER.replace(b" 1;", b" 0;"), bytes(len(MARKER))], ids=["another", "none"])
def test_kernels_of_another_version_are_not_loaded(site, tmp_path, marker):
    shutil.copytree(site / "trl_r3", tmp_path / "trl_r3")
    library = tmp_path / "trl_r3" / "gating" / "_C.abi3.so"
    built = library.read_bytes()
    assert built.count(MARKER) == 1
    assert marker != MARKER
    library.write_bytes(built.replace(MARKER, marker))
    run([sys.executable, "-c", STALE], env=environment(tmp_path), cwd=tmp_path, timeout=120)


def build_arguments(monkeypatch, target):
    seen = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: seen.update(arguments))
    monkeypatch.setenv("TRL_R3_BUILD", target)
    runpy.run_path(str(ROOT / "setup.py"))
    return seen


def test_by_default_nothing_is_compiled(monkeypatch):
    assert build_arguments(monkeypatch, "") == {}


def test_an_unknown_build_is_named(monkeypatch):
    with pytest.raises(ValueError, match="TRL_R3_BUILD is 'gpu', expected one of"):
        build_arguments(monkeypatch, "gpu")
