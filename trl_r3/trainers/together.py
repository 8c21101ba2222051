"""Errors that end a run on every process, not on one while the others wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.utils import gather_object

Made = TypeVar("Made")


def make_together(accelerator: Any, make: Callable[[], Made], error: Exception | None = None) -> Made:
    """
    Make something on all processes, or raise on all what any of them has to raise.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            That of the trainer.
        make (`Callable`):
            Returns what is made. Its `RuntimeError` or `ValueError` is raised on all processes.
        error (`Exception`, *optional*):
            What this process has to raise already; nothing is made then.

    Returns:
        What `make` returned.

    Raises:
        `Exception`: As [`raise_together`].
    """
    made: Any = None
    if error is None:
        try:
            made = make()
        except (RuntimeError, ValueError) as refusal:
            error = refusal
    raise_together(accelerator, error)
    return made


def raise_together(accelerator: Any, error: Exception | None) -> None:
    """
    Raise what any process has to raise on all of them, in the same place and with the same text.

    Every process has to come here equally often.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            That of the trainer.
        error (`Exception`, *optional*):
            What this process has to raise.

    Raises:
        `Exception`: The error of the first process that has one; with several processes its text begins with its rank.
    """
    if accelerator.num_processes == 1:
        if error is not None:
            raise error
        return
    errors = gather_object([error])
    rank, first = next(((rank, each) for rank, each in enumerate(errors) if each is not None), (0, None))
    if first is not None:
        raise type(first)(f"process {rank}: {first}") from error
