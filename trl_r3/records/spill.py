"""What was recorded of a rollout in files instead of host memory, mapped into it page by page where it is read."""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_NAME = "tensor"


class SpilledTensors:
    """
    Tensors of a rollout, one safetensors file each, in a folder of their own.

    The files go with this object: by [`SpilledTensors.remove`], or when it is collected or the process ends. Tensors
    that are still held then keep their values, for what is mapped outlives its name; where a file system keeps a name
    for it (NFS), an empty folder may stay.

    Args:
        folder (`str`):
            Where to make the folder; created if it does not exist.

    Example:

    ```python
    >>> spilled = SpilledTensors("/scratch/records")
    >>> record = spilled.take(record)
    >>> spilled.remove()
    ```
    """

    def __init__(self, folder: str):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(dir=folder, prefix="records-", ignore_cleanup_errors=True)
        self._written = 0

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return Path(self._folder.name)

    def take(self, tensor: Tensor) -> Tensor:
        """
        Write a tensor, and map it back.

        Args:
            tensor (`torch.Tensor`):
                On the host, of any shape: a record, or a part of a sampling mask.

        Returns:
            `torch.Tensor`: The same values, shape and dtype, in a memory-mapped file.
        """
        if not tensor.numel():  # there is nothing to map
            return tensor
        path = self.folder / f"{self._written}.safetensors"
        self._written += 1
        save_file({_NAME: tensor.contiguous()}, path)
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(_NAME)

    def remove(self) -> None:
        """Remove the files."""
        self._folder.cleanup()
