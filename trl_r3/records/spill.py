"""Records in files instead of host memory, mapped into it page by page where they are read.

Legend: R rows of a record, L MoE layers, K experts per token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_NAME = "routed_experts"


class SpilledRecords:
    """
    The records of a rollout, one safetensors file a sample, in a folder of their own.

    The files go with this object: by [`SpilledRecords.remove`], or when it is collected or the process ends. Records
    that are still held then keep their values, for what is mapped outlives its name.

    Args:
        folder (`str`):
            Where to make the folder; created if it does not exist.

    Example:

    ```python
    >>> spilled = SpilledRecords("/scratch/records")
    >>> records = spilled.take(records)
    >>> spilled.remove()
    ```
    """

    def __init__(self, folder: str):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(dir=folder, prefix="records-")
        self._written = 0

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return Path(self._folder.name)

    def take(self, records: Sequence[Tensor]) -> list[Tensor]:
        """
        Write records, and map them back.

        Args:
            records (sequence of `torch.Tensor` of shape `(R_i, L, K)`):
                Packed records, one a sample.

        Returns:
            list of `torch.Tensor`: The same values, shapes and dtypes, in memory-mapped files.
        """
        return [self._take(record) for record in records]

    def _take(self, record: Tensor) -> Tensor:
        if not record.numel():  # there is nothing to map
            return record
        path = self.folder / f"{self._written}.safetensors"
        self._written += 1
        save_file({_NAME: record.contiguous()}, path)
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(_NAME)

    def remove(self) -> None:
        """Remove the files."""
        self._folder.cleanup()
