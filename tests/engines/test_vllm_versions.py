"""Which vLLM routing replay accepts, what switches its capture on, and which returns sampling masks."""

from __future__ import annotations

import pytest

from trl_r3.engines.vllm_versions import (
    check_vllm_masks,
    check_vllm_version,
    sleeps_in_mode_keep,
    vllm_engine_kwargs,
)


@pytest.mark.parametrize("version", ["0.22.0", "0.22.0rc1", "0.30.0+cpu", "0.30.1.post1", "0.31.0", "0.33.2"])
def test_versions_that_work(version):
    check_vllm_version(version, tensor_parallel_size=1)
    kwargs = vllm_engine_kwargs(version)
    assert kwargs.pop("enable_return_routed_experts") is True
    assert kwargs == ({"enable_prefix_caching": True} if version >= "0.31" else {})


@pytest.mark.parametrize(
    "version, fact",
    [
        ("0.21.1", "vLLM 0.21.1 is installed, routing replay needs 0.22"),
        ("0.9.2", "needs 0.22"),
        ("0.1.dev1+g0123abc", "needs 0.22"),
        ("0.34.0", "vLLM 0.34.0 is installed, routing replay knows the format of 0.22 to 0.33"),
        ("1.0.0", "0.22 to 0.33"),
        ("N/A", "'N/A' is no version"),
    ],
)
def test_versions_that_do_not(version, fact):
    for check in (check_vllm_version, vllm_engine_kwargs):
        with pytest.raises(ValueError, match=fact):
            check(version)


@pytest.mark.parametrize("version, works", [("0.22.0", True), ("0.30.9", True), ("0.31.0", False), ("0.33.0", False)])
def test_tensor_parallel_colocate(version, works):
    if works:
        check_vllm_version(version, tensor_parallel_size=2)
    else:
        with pytest.raises(ValueError, match=rf"vLLM {version} crashes in colocate mode .* tensor parallel size 2"):
            check_vllm_version(version, tensor_parallel_size=2)


@pytest.mark.parametrize("version", ["0.28.0", "0.30.0+cpu", "0.33.1"])
def test_vllm_versions_with_masks(version):
    check_vllm_masks(version)


@pytest.mark.parametrize("version", ["0.22.0", "0.27.3", "0.34.0"])
def test_vllm_versions_without(version):
    with pytest.raises(ValueError, match="sampling masks are known from 0.28 to 0.33"):
        check_vllm_masks(version)


@pytest.mark.parametrize(
    "version, keeps", [("0.30.9", False), ("0.31.0", True), ("0.31.2+cpu", True), ("0.32.0", False), ("0.33.0", False)]
)
def test_one_version_sleeps_in_mode_keep_only(version, keeps):
    assert sleeps_in_mode_keep(version) is keeps
