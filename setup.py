"""Compiled kernels for `trl_r3.gating`, built where TRL_R3_BUILD asks for them; everything else is in setup.cfg."""

import os

from setuptools import setup

CSRC = "trl_r3/gating/csrc"
TARGETS = ("", "cpu")
# The oldest torch whose stable ABI one binary has to load under.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def native_build(target: str) -> dict:
    """
    Arguments of `setup` that build the extension.

    Args:
        target (`str`):
            `""` for none (the wheel is pure Python) or `"cpu"`.

    Returns:
        `dict`: keyword arguments of `setuptools.setup`.
    """
    if target not in TARGETS:
        raise ValueError(f"TRL_R3_BUILD is {target!r}, expected one of {TARGETS}.")
    if not target:
        return {}
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise RuntimeError(
            f"TRL_R3_BUILD={target} compiles against the torch of this environment, but none can be imported. Install "
            "torch first and pass --no-build-isolation to pip."
        ) from error

    extension = {
        "sources": [f"{CSRC}/gating_cpu.cpp"],
        "extra_compile_args": {
            "cxx": ["-O3", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", STABLE_ABI]
        },
        "py_limited_api": True,
    }
    return {
        "ext_modules": [cpp_extension.CppExtension("trl_r3.gating._C", **extension)],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**native_build(os.environ.get("TRL_R3_BUILD", "")))
