"""Real tokens only: the module above the decoder layers sees the sequences of a padded batch as one row.

Attention goes sequence by sequence. What comes out is padded again, so that everything above sees what it always saw.
With a record an order of sums that is another one cannot change an expert.

Legend: B batch, T tokens of a padded sequence, N real tokens of the batch, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ._compat_routers import attention_of
from .compaction import RealRows
from .patches import ActivePass

_ATTENTION = "sdpa"  # whose kernel takes a sequence without a mask
_FORWARD = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache"}


@dataclass
class PackedBatch:
    """
    Where the real tokens of a padded batch are, if each of its sequences has them in one piece.

    Args:
        rows ([`RealRows`]):
            Which of the `B * T` rows are real.
        lengths (list of `int`):
            Real tokens of each sequence that has any.
    """

    rows: RealRows
    lengths: list[int]

    @classmethod
    def of(cls, real_BT: Tensor) -> PackedBatch | None:
        """Of the tokens that are real, on the host, without holes; `None` where there is nothing to skip."""
        rows = RealRows.of(real_BT)
        if rows is None:
            return None
        return cls(rows, [length for length in real_BT.sum(1).tolist() if length])

    def take(self, values_N: Tensor) -> Tensor:
        """(N, ...) of the rows of the padded batch."""
        return self.rows.real(values_N)

    def padded(self, values_N: Tensor) -> Tensor:
        """(B * T, ...) of `(N, ...)`: zeros where padding is."""
        return self.rows.padded(values_N)

    def place(self, rows_M: Tensor | None) -> Tensor | None:
        """Where rows of the padded batch are among the real ones, on the host as they are."""
        if rows_M is None:
            return None
        place = torch.zeros(self.rows.count, dtype=torch.int64, device="cpu")
        place[self.rows.rows_N] = torch.arange(len(self.rows.rows_N), device="cpu")
        return place[rows_M.cpu()]

    def forward(self, forward: Callable, kwargs: dict[str, Any]) -> Any:
        """Run the module over the real tokens; its output is that of a padded batch, zero where padding is."""
        (batch_size, width), rows = self.rows.size, self.rows
        name = "input_ids" if kwargs.get("inputs_embeds") is None else "inputs_embeds"
        given, positions = kwargs[name], kwargs.get("position_ids")
        if positions is None:  # of the padded batch, as the module would count them
            positions = torch.arange(width, device=given.device)
        rest = {name: value for name, value in kwargs.items() if name not in _FORWARD}
        output = forward(
            **{name: rows.real(given.flatten(0, 1))[None]},
            position_ids=rows.real(positions.expand(batch_size, width).flatten())[None],
            attention_mask=None,
            use_cache=False,  # a config may want one, which would hold one sequence
            **rest,
        )
        hidden = output.last_hidden_state
        output.last_hidden_state = rows.padded(hidden.flatten(0, 1)).view(batch_size, width, -1)
        if output.get("router_logits") is not None:  # the auxiliary loss takes them with the mask of the whole batch
            output.router_logits = tuple(map(rows.padded, output.router_logits))
        return output


def has_holes(real_BT: Tensor) -> bool:
    """Whether any sequence has padding between tokens that are real."""
    beginnings = (real_BT[:, 1:] & ~real_BT[:, :-1]).sum(1) + real_BT[:, :1].sum(1)
    return bool((beginnings > 1).any())


class PackedAttention:
    """
    Attention of Transformers that goes sequence by sequence in a pass that is packed, and is itself in any other.

    Args:
        stack (`torch.nn.Module`):
            The module above the decoder layers.
        active ([`ActivePass`]):
            The pass that a thread is in, of a forward or of a recompute.
    """

    def __init__(self, stack: nn.Module, active: ActivePass):
        self.active = active
        self.implementation = attention_of(stack)
        self.expected: int | None = None  # calls in a forward, once a padded one has been seen
        self.refused: str | None = None  # what a padded forward showed to speak against it
        self._entries = []
        if self.implementation == _ATTENTION:
            self._entries = [
                _Entry(ALL_ATTENTION_FUNCTIONS, self._attend),
                _Entry(ALL_MASK_ATTENTION_FUNCTIONS, self._mask),
            ]

    def remove(self) -> None:
        """Give Transformers its own functions back."""
        while self._entries:
            self._entries.pop().remove()

    def meet(self, calls: int) -> None:
        """After a padded forward: the first tells how often attention runs in one."""
        if self.expected is None:
            self.expected = calls

    def why_not(self) -> str | None:
        """What speaks against packing, after a padded forward."""
        if self.implementation != _ATTENTION:
            return f"its attention is {self.implementation!r}, and only {_ATTENTION!r} is packed"
        return self.refused if self.expected else "its attention is not the one that Transformers registers"

    def check(self, calls: int) -> None:
        """Refuse a packed forward in which attention ran less often, or more."""
        if calls != self.expected:
            raise RuntimeError(
                f"attention ran {calls} times in a packed forward, expected {self.expected}: some of it may have "
                "looked across sequences. Set `padding='keep'`."
            )

    def _attend(self, own: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
        pass_ = self.active.current
        if pass_ is None:
            return own(module, query, key, value, *args, **kwargs)
        pass_.attended += 1
        lengths = pass_.lengths
        if lengths is None:
            if self.expected is None:
                self._look_for_windows(kwargs)
            return own(module, query, key, value, *args, **kwargs)
        if query.shape[2] != sum(lengths) or key.shape[2] != sum(lengths):
            raise RuntimeError(
                f"attention of {type(module).__name__} has {query.shape[2]} queries and {key.shape[2]} keys in a "
                f"packed forward of {sum(lengths)} tokens. Set `padding='keep'`."
            )
        kwargs = {**kwargs, "attention_mask": None, "is_causal": True}
        pieces = zip(*(tensor.split(lengths, 2) for tensor in (query, key, value)), strict=True)
        return torch.cat([own(module, q, k, v, **kwargs)[0] for q, k, v in pieces], dim=1), None

    def _look_for_windows(self, kwargs: dict[str, Any]) -> None:
        for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
            if kwargs.get(name) is not None:
                self.refused = f"its attention has a `{name}`"

    def _mask(self, own: Callable, *args: Any, **kwargs: Any) -> Any:
        pass_ = self.active.current
        if pass_ is not None and pass_.lengths is not None:
            return None
        if pass_ is not None and kwargs.get("mask_function") is not causal_mask_function:
            self.refused = "its attention has a mask of its own, such as a window or chunks"
        return own(*args, **kwargs)


class _Entry:
    """A function of a registry of Transformers, with another one around it until it is removed."""

    def __init__(self, registry: MutableMapping[str, Callable], around: Callable):
        self.registry, self.own = registry, registry[_ATTENTION]
        self.around: Callable | None = around
        registry[_ATTENTION] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs) if self.around is None else self.around(self.own, *args, **kwargs)

    def remove(self) -> None:
        """Put back what was there. If another one lies around this, it stays inside and only passes on."""
        self.around = None
        if self.registry[_ATTENTION] is not self:
            return
        own = self.own
        while isinstance(own, _Entry) and own.around is None:  # removed before
            own = own.own
        del self.registry[_ATTENTION]
        if self.registry[_ATTENTION] is not own:
            self.registry[_ATTENTION] = own
