"""A Triton driver for a machine without a GPU, where vLLM 0.31 and later import Triton all the same."""

from collections.abc import Callable

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class HostDriver(DriverBase):
    """The only active driver; kernels never reach it."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_benchmarker(self) -> Callable:
        raise NotImplementedError("nothing is measured where kernels are interpreted")
