"""The record of one forward over a packed row of tokens, where positions begin again at each sample or branch.

Legend: N forwarded tokens, L MoE layers, K experts per token, M observed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .checks import MisalignedRecordError
from .prefix_tree import TreeRecord
from .samples import Observation

_OBSERVED = 512  # rows of a forward at most


@dataclass
class PackedRow:
    """
    What is replayed on a packed row: a source of records for one forward.

    Args:
        tokens, depths (`torch.Tensor` of shape `(N,)`):
            The forwarded tokens, and how many tokens of their sample stand before each.
        tree ([`TreeRecord`]):
            Their rows.
        sent (sequence of `int`):
            Version of the weights at the first request of each sample.
        spanning (`int`):
            How many of these samples have a request that saw the weights change.
        staleness (`int`):
            By how many versions the weights are ahead of `sent`, summed up.
        version (`int`, *optional*):
            Version that the weights of the forward have on the server, too. Rows that were recorded at it are fresh:
            only these can be judged.
    """

    tokens: Tensor
    depths: Tensor
    tree: TreeRecord
    sent: Sequence[int]
    spanning: int
    staleness: int = 0
    version: int | None = None
    observed: Tensor | None = field(default=None, init=False)
    observations: list[Observation] = field(default_factory=list, init=False)

    @property
    def recorded(self) -> Tensor:
        """(N,) of `bool`: tokens that have a row."""
        return self.tree.owners >= 0

    @property
    def fresh(self) -> Tensor:
        """(N,) of `bool`: tokens whose rows, and those before them, were recorded at the weights of the forward."""
        if self.version is None:
            return torch.zeros(len(self.tokens), dtype=torch.bool, device="cpu")
        return self.recorded & (self.tree.versions == self.version)

    def take(self, batch_size: int, num_tokens: int, tokens: Tensor | None = None) -> Tensor:
        """Packed ids of shape `(1, N, L, K)`, if the forward is of these tokens."""
        if (batch_size, num_tokens) != (1, len(self.tokens)):
            raise MisalignedRecordError(
                f"a forward scores {batch_size} x {num_tokens} tokens with the record of a packed row of "
                f"{len(self.tokens)}. Score each row once, as it was packed."
            )
        if tokens is not None:
            wrong = tokens[0] != self.tokens.to(tokens.device)
            if bool(wrong.any()):
                first = int(wrong.nonzero()[0])
                raise MisalignedRecordError(
                    f"{int(wrong.sum())} of {num_tokens} tokens of a packed row differ from those that its record was "
                    f"made for, the first at position {first}: {int(tokens[0, first])} instead of "
                    f"{int(self.tokens[first])}. Leave the rows as they were packed."
                )
        self.observed = self._rows_to_observe()
        return self.tree.rows.unsqueeze(0)

    def observe(self, live_MLK: Tensor) -> None:
        """Take the live selection of the rows of `observed`."""
        assert self.observed is not None  # or nothing was asked for
        around = (self.tree.rows[self.observed + step] for step in (0, -1, 1))
        self.observations.append(Observation(self.tree.owners[self.observed], live_MLK, *around))

    def take_packed(self, lengths: Sequence[int], tokens: Tensor | None = None) -> Tensor:
        """Likewise, where the positions of the row begin again: its samples share no prefix."""
        return self.take(1, sum(lengths), tokens)

    def real(self, mask: Tensor) -> Tensor:
        """(1, N) of `bool`, on the host: a packed row has no padding of its own."""
        return mask.detach().bool().cpu()

    def _rows_to_observe(self) -> Tensor | None:
        """Fresh rows, spread evenly, whose neighbours in the sample are their neighbours in the row."""
        fresh, follows = self.fresh, self.depths[1:] == self.depths[:-1] + 1
        inner = (fresh[:-2] & fresh[1:-1] & fresh[2:] & follows[:-1] & follows[1:]).nonzero()[:, 0] + 1
        if len(inner) > _OBSERVED:
            inner = inner[torch.linspace(0, len(inner) - 1, _OBSERVED, device="cpu").round().long()]
        return inner if len(inner) else None
