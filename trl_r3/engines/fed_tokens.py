"""Which of the tokens that `generate()` feeds anything follows from: none of a prompt's padding, none behind an end.

Legend: B sequences, T tokens of a forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..routers.passes import RecordedRoutes
from ..routers.router_replay import RouterReplay
from ._compat_engines import noted_ends


class FedTokens:
    """
    Told of each forward of one call of `generate`, and of the sequences that have ended.

    Prompts are read from the attention mask, which waits for the device once a forward. Sequences that have ended are
    sent to the host, and count from when they have arrived: nothing waits for them.

    Args:
        ends (sequence of `int`, *optional*):
            The tokens at which the caller cuts sequences. Only a sequence that has reached one of these counts as
            ended: what is stopped otherwise, `generate` fills up with padding, which the caller reads up to the first
            cut. By default nothing behind a sequence is read.
    """

    def __init__(self, ends: Sequence[int] | None = None) -> None:
        self._ends = None if ends is None else torch.tensor(list(ends), dtype=torch.int64, device="cpu")
        self._ended_B: Tensor | None = None  # on the device
        self._known_B: Tensor | None = None  # on the host
        self._arriving: list[tuple[Any, Tensor]] = []

    def note(self, done_B: Tensor, tokens_B: Tensor) -> None:
        """After a token was drawn, or fed as padding: which sequences have ended and are fed padding from now on."""
        if self._ends is not None:
            self._ends = self._ends.to(tokens_B.device)
            done_B = done_B & torch.isin(tokens_B, self._ends)
        self._ended_B = done_B if self._ended_B is None else self._ended_B | done_B
        if done_B.device.type != "cuda":
            self._known_B = self._ended_B.cpu()
            return
        there_B = torch.empty(done_B.shape, dtype=torch.bool, device="cpu", pin_memory=True)
        there_B.copy_(self._ended_B, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._arriving.append((event, there_B))

    def real(self, size: Sequence[int], mask: Any) -> Tensor | None:
        """
        Which tokens of the next forward are real.

        Args:
            size (sequence of `int`):
                B and T.
            mask (`Any`):
                Its attention mask, of the tokens of its cache and of its own.

        Returns:
            `torch.BoolTensor` of shape `(B, T)`, on the host; `None` where nothing is known.
        """
        while self._arriving and self._arriving[0][0].query():
            self._known_B = self._arriving.pop(0)[1]
        if self._known_B is not None:
            return (~self._known_B)[:, None].expand(*size) if len(self._known_B) == size[0] else None
        if self._ended_B is not None or size[1] == 1 or not torch.is_tensor(mask) or mask.ndim != 2:
            return None
        is_of_these = mask.shape[0] == size[0] and mask.shape[1] >= size[1]
        return mask[:, mask.shape[1] - size[1] :].bool().cpu() if is_of_these else None


@contextmanager
def recorded_as_fed(
    lm: nn.Module, replay: RouterReplay, ends: Sequence[int] | None = None
) -> Iterator[RecordedRoutes]:
    """
    Record one call of `generate` with a handle that skips padding: tokens that nothing follows from go to no expert.

    Args:
        lm (`torch.nn.Module`):
            The model that generates.
        replay ([`RouterReplay`]):
            Its handle.
        ends (sequence of `int`, *optional*):
            As in [`FedTokens`].

    Yields:
        [`RecordedRoutes`].
    """
    fed = FedTokens(ends)
    with noted_ends(lm, fed.note), replay.record(fed.real) as recorded:
        yield recorded
