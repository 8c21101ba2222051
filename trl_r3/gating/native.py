"""The one door to compiled kernels: loads the extension beside this file, where one was built."""

from pathlib import Path

import torch

from .._compat import warn

FORWARD = "trl_r3::gating_forward"
# Raised with every change of what the raw ops take or return. Compiled kernels carry the number in their file
# (csrc/gating_cpu.cpp), because nothing else compares their arguments with those of the ops that they join.
OPS_VERSION = 1
MARKER = f"trl_r3 gating ops, version {OPS_VERSION};".encode()
LIBRARY = Path(__file__).with_name("_C.abi3.so")


def load_native_kernels(library: Path = LIBRARY) -> None:
    """
    Add the kernels of `library` to the ops of this package, which must be defined already.

    Nothing happens where no extension was built. One that does not load, or that was built for another version of the
    ops, costs a warning: the PyTorch implementation computes the same numbers.

    Args:
        library (`pathlib.Path`, *optional*, defaults to the extension that was built with this package):
            Shared library to load.
    """
    if not library.exists():
        return
    try:
        if MARKER in library.read_bytes():  # before it is loaded, which registers its kernels
            torch.ops.load_library(library)
            return
        reason = f"were built for another version of the op than {OPS_VERSION}, that of this package"
    except OSError as error:
        reason = f"cannot be loaded with torch {torch.__version__} ({error})"
    warn(
        f"The gating kernels in {library} {reason}, so masked_topk_gating uses its PyTorch implementation. Rebuild "
        "them with TRL_R3_BUILD=cpu|cuda pip install --no-build-isolation ., or delete that file."
    )


def native_kernels() -> tuple[str, ...]:
    """Devices for which compiled kernels are registered: a subset of `("cpu", "cuda")`."""
    return tuple(
        key.lower() for key in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key(FORWARD, key)
    )
