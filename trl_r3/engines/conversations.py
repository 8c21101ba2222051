"""Routes of conversations that are rendered and tokenized anew for each turn, as asynchronous rollouts do it.

Legend: P prompt and C completion tokens of a turn, T = P + C, R rows, L MoE layers, D decoder layers, K experts per
token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..records.checks import check_rows
from ..records.record import RoutingLayout, to_record
from .turns import common_prefix


@dataclass(frozen=True)
class Piece:
    """
    Rows that one request has told, in the order of their tokens.

    Args:
        rows (`torch.Tensor` of shape `(R, L, K)`):
            Packed ids on the host.
        sent, answered (`int`):
            Versions of the weights when the request was sent, and when it was answered.
    """

    rows: Tensor
    sent: int
    answered: int


@dataclass(frozen=True)
class ConversationRoutes:
    """
    The rows of all tokens of a conversation but the last, by the requests that told them.

    Conversations share their pieces, so that one of many turns takes memory for each of its tokens once.

    Args:
        pieces (`tuple[Piece, ...]`):
            From the first token on.
        fault (`str`, *optional*):
            What was wrong with an answer, whose rows are missing.
    """

    pieces: tuple[Piece, ...] = ()
    fault: str | None = None

    def __len__(self) -> int:
        return sum(len(piece.rows) for piece in self.pieces)

    def go_on(self, matched: int, turn: ConversationRoutes) -> ConversationRoutes:
        """
        Join the next turn, whether it appends to what is held, renders the end of it anew, or begins a new sequence.

        The earliest turn that fed a token wins, because its routing gave the sampled log-probabilities. From the first
        token that differs, the rows are those of the turn.

        Args:
            matched (`int`):
                Tokens that are held and begin the prompt of the turn.
            turn ([`ConversationRoutes`]):
                All rows of the turn.
        """
        kept = min(matched, len(self))  # no row is held of the last token, which was never fed
        return ConversationRoutes((*self._cut(0, kept), *turn._cut(kept, len(turn))), self.fault or turn.fault)

    def _cut(self, first: int, end: int) -> Iterator[Piece]:
        at = 0
        for piece in self.pieces:
            rows = piece.rows[max(first - at, 0) : max(end - at, 0)]
            if len(rows):
                yield Piece(rows, piece.sent, piece.answered)
            at += len(piece.rows)

    @property
    def rows(self) -> Tensor:
        """(T - 1, L, K), at least one piece given."""
        return torch.cat([piece.rows for piece in self.pieces])

    @property
    def spans(self) -> np.ndarray:
        """(pieces, 3) of `int64`: how many rows, and the two versions of their request."""
        spans = [(len(piece.rows), piece.sent, piece.answered) for piece in self.pieces]
        return np.array(spans, dtype=np.int64).reshape(-1, 3)


class RoutedTokens(list):
    """
    Sampled tokens that take the routes of their conversation along, wherever the list itself is handed on.

    Args:
        tokens (iterable of `int`):
            The C sampled tokens.
        routes ([`ConversationRoutes`]):
            Of prompt and completion.
    """

    def __init__(self, tokens: Iterable[int], routes: ConversationRoutes):
        super().__init__(tokens)
        self.routes = routes


@dataclass
class Conversation:
    """
    A conversation that goes on: its tokens up to the last answer, and their routes.

    Args:
        layout ([`RoutingLayout`]):
            Layers and experts of the model.
    """

    layout: RoutingLayout
    tokens: list[int] = field(default_factory=list, init=False)
    routes: ConversationRoutes = field(default=ConversationRoutes(), init=False)

    def known_rows(self, prompt: Sequence[int]) -> int:
        """How many rows of a prompt are held."""
        return min(common_prefix(self.tokens, prompt), len(self.routes))

    def rows_left_out(self, prompt: Sequence[int]) -> int:
        """How many rows its request need not tell: those that are held, but one comes, or an answer may have none."""
        return min(self.known_rows(prompt), len(prompt) - 1)

    def add(
        self,
        prompt: Sequence[int],
        completion: Sequence[int],
        told: np.ndarray | ValueError | None,
        versions: tuple[int, int],
        number: int,
    ) -> RoutedTokens:
        """
        Take an answer.

        Nothing is raised: an error would end the process that rolls out, and say so to nobody.

        Args:
            prompt, completion (sequence of `int`):
                P tokens that were sent, C that were answered.
            told (`numpy.ndarray` of shape `(R, D, K)`, or `ValueError`, *optional*):
                Ids of all T - 1 rows, or of those that were not left out; or why there are none.
            versions (`tuple[int, int]`):
                Of the weights, when the request was sent and when it was answered.
            number (`int`):
                What an error names.
        """
        known = self.known_rows(prompt)
        fed = len(prompt) + len(completion) - 1
        record, fault = None, str(told) if isinstance(told, ValueError) else None
        if isinstance(told, np.ndarray):
            try:
                record = self._record(told, known, self.rows_left_out(prompt), fed, number)
            except ValueError as error:
                fault = str(error)
        if record is None:
            size = (fed - known, len(self.layout.moe_layers), self.layout.top_k)
            record = torch.full(size, self.layout.missing, dtype=self.layout.storage_dtype, device="cpu")
        held = tuple(self.routes._cut(0, known))
        new = (Piece(record, *versions),) if len(record) else ()
        self.tokens = [*prompt, *completion]
        self.routes = ConversationRoutes((*held, *new), self.routes.fault or fault)
        return RoutedTokens(completion, self.routes)

    def _record(self, told: np.ndarray, known: int, left_out: int, fed: int, number: int) -> Tensor:
        """(fed - known, L, K), checked."""
        if len(told) not in (fed, fed - left_out):
            expected = f"{fed}, or {fed - left_out} without those of the turns before" if left_out else f"{fed}"
            raise ValueError(
                f"sample {number}: the server returned {len(told)} rows of routes for {fed + 1} tokens, expected "
                f"{expected}: the last token is sampled, never fed. Use vLLM 0.22 to 0.33 as it is."
            )
        record = to_record(told[len(told) - (fed - known) :], self.layout, number)
        check_rows(record, self.layout, sample=number)
        return record
