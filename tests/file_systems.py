"""A file system of the kind that clusters have, on the one that is here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def keep_what_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let removing a file that is mapped rename it, as clients of NFS do: its folder cannot be removed then."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("reads what is mapped from /proc")
    unlink = os.unlink

    def remove(path, *, dir_fd=None):
        whole = Path(path) if dir_fd is None else Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / path
        if str(whole) in Path("/proc/self/maps").read_text():
            whole.rename(whole.with_name(f".nfs{whole.stem}"))
        else:
            unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", remove)
