"""Routes that an engine has returned already, so that a later turn asks for the rows that are missing only.

Legend: P prompt tokens, C completion tokens, D decoder layers, K experts per token.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from ..records.samples import token_bytes


class KnownRoutes:
    """
    The rows of the conversations of one rollout, whose weights do not change.

    A turn whose prompt goes on from tokens that were fed before takes their rows from there: the earliest turn that
    fed a token wins.
    """

    def __init__(self) -> None:
        self._rows: dict[bytes, np.ndarray] = {}  # by tokens of prompt and completion
        self._sorted: list[bytes] = []  # their keys
        self._new: dict[bytes, np.ndarray] = {}
        self._continued: set[bytes] = set()

    def start(self, prompt: Sequence[int]) -> int:
        """How many rows of a prompt are known."""
        before = self._before(prompt)
        return 0 if before is None else len(self._rows[before])

    def complete(self, prompt: Sequence[int], completion: Sequence[int], rows: np.ndarray) -> np.ndarray:
        """
        Put the known rows of a prompt before those that were returned.

        Args:
            prompt, completion (sequence of `int`):
                Tokens of the request.
            rows (`numpy.ndarray` of shape `(P + C - 1 - start, D, K)`):
                What the engine returned: from [`KnownRoutes.start`] on, or all rows where it cannot leave any out.

        Returns:
            `numpy.ndarray` of shape `(P + C - 1, D, K)`; `rows` as they are where their number is neither.
        """
        before = self._before(prompt)
        left_out = len(prompt) + len(completion) - 1 - len(rows)
        if before is not None:
            self._continued.add(before)
            if left_out == len(self._rows[before]):
                rows = np.concatenate([self._rows[before], rows])
        if len(rows) == len(prompt) + len(completion) - 1:
            # an engine may fill the buffer behind a view again
            self._new[token_bytes([*prompt, *completion])] = rows if rows.base is None else rows.copy()
        return rows

    def end_turn(self) -> None:
        """Remember the turn that is over, and forget what it went on from: one record a conversation is kept."""
        for tokens in self._continued:
            del self._rows[tokens]
        self._rows.update(self._new)
        self._new, self._continued = {}, set()
        self._sorted = sorted(self._rows)

    def _before(self, prompt: Sequence[int]) -> bytes | None:
        """The longest conversation that a prompt goes on from."""
        tokens = bound = token_bytes(prompt)
        # Of thousands of conversations few are compared: one that the prompt begins with sorts before it, and what
        # sorts between the two begins with it, too.
        while place := bisect_right(self._sorted, bound):
            nearest = self._sorted[place - 1]
            if tokens.startswith(nearest):
                return nearest
            bound = _shared_beginning(tokens, nearest)
        return None


def _shared_beginning(one: bytes, other: bytes) -> bytes:
    length = min(len(one), len(other))
    differs = np.frombuffer(one, np.uint8, length) != np.frombuffer(other, np.uint8, length)
    return one[: int(differs.argmax())] if differs.any() else one[:length]
