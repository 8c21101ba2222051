"""A tensor that notes each time that its values are asked for on the host: on a GPU, each is a wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

READS = ("cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__index__", "nonzero", "unique", "equal")


class CountedReads(torch.Tensor):
    """What is computed of it counts, too; what has been read lies on the host and does not."""

    noted: list[str] | None = None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name not in READS:
            return super().__torch_function__(func, types, args, kwargs or {})
        if CountedReads.noted is not None:
            CountedReads.noted.append(name)
        with torch._C.DisableTorchFunctionSubclass():
            read = func(*args, **(kwargs or {}))
        return read.as_subclass(torch.Tensor) if isinstance(read, torch.Tensor) else read

    @staticmethod
    @contextmanager
    def counted() -> Iterator[list[str]]:
        """Note the reads inside."""
        CountedReads.noted = noted = []
        try:
            yield noted
        finally:
            CountedReads.noted = None
