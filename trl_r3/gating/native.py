"""The one door to compiled kernels: loads the extension beside this file, where one was built."""

import warnings
from pathlib import Path

import torch

FORWARD = "trl_r3::gating_forward"
LIBRARY = Path(__file__).with_name("_C.abi3.so")


def load_native_kernels(library: Path = LIBRARY) -> None:
    """
    Add the kernels of `library` to the ops of this package, which must be defined already.

    Nothing happens where no extension was built. One that does not load costs a warning: the PyTorch implementation
    computes the same numbers.

    Args:
        library (`pathlib.Path`, *optional*, defaults to the extension that was built with this package):
            Shared library to load.
    """
    if not library.exists():
        return
    try:
        torch.ops.load_library(library)
    except OSError as error:
        warnings.warn(
            f"The gating kernels in {library} cannot be loaded with torch {torch.__version__}, so masked_topk_gating "
            f"uses its PyTorch implementation: {error}. Rebuild them with "
            "TRL_R3_BUILD=cpu|cuda pip install --no-build-isolation, or delete that file.",
            RuntimeWarning,
            stacklevel=2,
        )


def native_kernels() -> tuple[str, ...]:
    """Devices for which compiled kernels are registered: a subset of `("cpu", "cuda")`."""
    return tuple(
        key.lower() for key in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key(FORWARD, key)
    )
