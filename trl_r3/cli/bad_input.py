"""The error of commands for arguments that no run can begin with: `command.main` prints it and exits with status 2."""

from __future__ import annotations

from pathlib import Path


class BadInput(Exception):
    """An argument that no run can begin with. The message has the fact and the remedy."""


def first_line(error: BaseException) -> str:
    """The first sentence of what a library has to say, without a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[:1] or [type(error).__name__]
    if said[0].endswith(":"):  # the fact is on the next
        said += lines[1:2]
    return " ".join(said).rstrip(".")


def check_writable(folder: Path) -> None:
    """
    Make a folder that something will be written to, before anything is computed.

    Raises:
        [`BadInput`]: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder} cannot be written to: {first_line(error)}. Pass another `--output`.") from error
