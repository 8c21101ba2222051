"""Compiled kernels for `trl_r3.gating`, built where TRL_R3_BUILD asks for them; everything else is in setup.cfg."""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

CSRC = "trl_r3/gating/csrc"
TARGETS = ("", "cpu", "cuda")
# The oldest torch whose stable ABI one binary has to load under.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    STABLE_ABI,
]
# Machine code for A100 and H100/H200, and PTX that newer devices compile when they load it.
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "--threads=2",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]


def find_cuda() -> Path:
    """Root of the CUDA toolkit: CUDA_HOME, that of the nvcc on PATH, or the default installation."""
    on_path = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), on_path and Path(on_path).resolve().parents[1], "/usr/local/cuda"]
    for home in map(Path, filter(None, candidates)):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime_api.h").exists():
            return home
    raise RuntimeError(
        f"TRL_R3_BUILD=cuda needs the CUDA toolkit, but none of {list(filter(None, candidates))} holds bin/nvcc and "
        "include/cuda_runtime_api.h. Install it, set CUDA_HOME, or use TRL_R3_BUILD=cpu."
    )


def cuda_arguments(build_extension: type) -> tuple[dict, type]:
    """
    What the CUDA kernels add to the extension.

    nvcc is called here rather than by torch, whose build refuses CUDA sources where torch itself is a CPU build. The
    kernels include no header of torch, so that nvcc is done in seconds.

    Args:
        build_extension (`type`):
            Command class to extend.

    Returns:
        `tuple`: arguments of `CppExtension`, and a command class that compiles the kernels before it links.
    """
    home = find_cuda()

    class BuildKernels(build_extension):
        def build_extensions(self) -> None:
            compiled = Path(self.build_temp).resolve() / "gating_kernels.o"
            compiled.parent.mkdir(parents=True, exist_ok=True)
            source = f"{CSRC}/gating_kernels.cu"
            subprocess.run([home / "bin/nvcc", *NVCC_FLAGS, "-c", source, "-o", compiled], check=True)
            self.extensions[0].extra_objects.append(str(compiled))
            super().build_extensions()

    arguments = {
        "include_dirs": [str(home / "include")],
        "library_dirs": [str(home / "lib64")],
        "libraries": ["cudart_static", "dl", "rt", "pthread"],
    }
    return arguments, BuildKernels


def native_build(target: str) -> dict:
    """
    Arguments of `setup` that build the extension.

    Args:
        target (`str`):
            `""` for none (the wheel is pure Python), `"cpu"`, or `"cuda"` for both kinds of kernels.

    Returns:
        `dict`: keyword arguments of `setuptools.setup`.
    """
    if target not in TARGETS:
        raise ValueError(f"TRL_R3_BUILD is {target!r}, expected one of {TARGETS}.")
    if not target:
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise RuntimeError(
            f"TRL_R3_BUILD={target} compiles against the torch of this environment, but none can be imported. Install "
            "torch first and pass --no-build-isolation to pip."
        ) from error

    sources, arguments, command = [f"{CSRC}/gating_cpu.cpp"], {}, BuildExtension
    if target == "cuda":
        sources.append(f"{CSRC}/gating_cuda.cpp")
        arguments, command = cuda_arguments(BuildExtension)
    extension = CppExtension(
        "trl_r3.gating._C", sources, extra_compile_args={"cxx": CXX_FLAGS}, py_limited_api=True, **arguments
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": command},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**native_build(os.environ.get("TRL_R3_BUILD", "")))
