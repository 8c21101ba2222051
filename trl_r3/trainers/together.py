"""Errors that end a run on every process, not on one while the others wait for it."""

from __future__ import annotations

from typing import Any

from accelerate.utils import gather_object


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
