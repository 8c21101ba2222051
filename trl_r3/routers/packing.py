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

from .._compat import attention_of
from .patches import ActivePass

_ATTENTION = "sdpa"  # whose kernel takes a sequence without a mask
_FORWARD = {"input_ids", "attention_mask", "position_ids"}


@dataclass
class PackedBatch:
    """
    Where the real tokens of a padded batch are.

    Args:
        size (`tuple[int, int]`):
            B and T.
        rows_N (`torch.Tensor` of shape `(N,)`):
            Which of the `B * T` rows are real, on the device of the forward.
        lengths (list of `int`):
            Real tokens of each sequence that has any.
    """

    size: tuple[int, int]
    rows_N: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, mask: Tensor) -> PackedBatch | None:
        """That of an attention mask of shape `(B, T)`; `None` where there is nothing to skip, or holes in a row."""
        real_BT = mask.detach().cpu().bool()
        if bool(real_BT.all()) or not bool(real_BT.any()):
            return None
        beginnings_B = (real_BT[:, 1:] & ~real_BT[:, :-1]).sum(1) + real_BT[:, 0]
        if int(beginnings_B.max()) > 1:
            return None
        rows_N = real_BT.flatten().nonzero()[:, 0].to(mask.device)
        lengths = [length for length in real_BT.sum(1).tolist() if length]
        return cls((mask.shape[0], mask.shape[1]), rows_N, lengths)

    def real(self, values: Tensor) -> Tensor:
        """(N, ...) of the `(B * T, ...)` rows of the padded batch, wherever these are."""
        return values[self.rows_N.to(values.device)]

    def place(self, rows_M: Tensor | None) -> Tensor | None:
        """Where rows of the padded batch are among the real ones."""
        if rows_M is None:
            return None
        place = self.rows_N.new_zeros(self.size[0] * self.size[1])
        place[self.rows_N] = torch.arange(len(self.rows_N), device=place.device)
        return place[rows_M.to(place.device)]

    def forward(self, forward: Callable, kwargs: dict[str, Any]) -> Any:
        """Run the module over the real tokens; its output is that of a padded batch, zero where padding is."""
        batch_size, width = self.size
        positions = kwargs.get("position_ids")
        if positions is None:  # of the padded batch, as the module would count them
            positions = torch.arange(width, device=self.rows_N.device)
        rest = {name: value for name, value in kwargs.items() if name not in _FORWARD}
        output = forward(
            input_ids=self.real(kwargs["input_ids"].flatten())[None],
            position_ids=self.real(positions.expand(batch_size, width).flatten())[None],
            attention_mask=None,
            **rest,
        )
        hidden = output.last_hidden_state
        output.last_hidden_state = self._padded(hidden.flatten(0, 1)).view(batch_size, width, -1)
        if output.get("router_logits") is not None:  # the auxiliary loss takes them with the mask of the whole batch
            output.router_logits = tuple(map(self._padded, output.router_logits))
        return output

    def _padded(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.size[0] * self.size[1], values.shape[-1]).index_copy(0, self.rows_N, values)


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
        self.calls = 0  # in passes
        self.expected: int | None = None  # calls in a forward
        self.refused = ""
        self._entries = [
            _Entry(ALL_ATTENTION_FUNCTIONS, self._attend),
            _Entry(ALL_MASK_ATTENTION_FUNCTIONS, self._mask),
        ]

    def remove(self) -> None:
        """Give Transformers its own functions back."""
        while self._entries:
            self._entries.pop().remove()

    def _attend(self, own: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
        pass_ = self.active.current
        if pass_ is None:
            return own(module, query, key, value, *args, **kwargs)
        self.calls, pass_.attended = self.calls + 1, pass_.attended + 1
        for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
            if kwargs.get(name) is not None:
                self.refused = f"its attention has a `{name}`"
        lengths = pass_.lengths
        if lengths is None:
            return own(module, query, key, value, *args, **kwargs)
        if query.shape[2] != sum(lengths) or key.shape[2] != sum(lengths):
            raise RuntimeError(
                f"attention of {type(module).__name__} has {query.shape[2]} queries and {key.shape[2]} keys in a "
                f"packed forward of {sum(lengths)} tokens. Set `padding='keep'`."
            )
        kwargs = {**kwargs, "attention_mask": None, "is_causal": True}
        pieces = zip(*(tensor.split(lengths, 2) for tensor in (query, key, value)), strict=True)
        return torch.cat([own(module, q, k, v, **kwargs)[0] for q, k, v in pieces], dim=1), None

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


def why_padded(args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Why a forward is not packed, by its arguments; `None` where nothing speaks against it."""
    mask, ids, positions = kwargs.get("attention_mask"), kwargs.get("input_ids"), kwargs.get("position_ids")
    if args or not torch.is_tensor(ids) or ids.ndim != 2 or kwargs.get("inputs_embeds") is not None:
        return "it is not given `input_ids` by name"
    if not torch.is_tensor(mask) or mask.shape != ids.shape:
        return "its attention mask is not one of (batch, tokens)"
    if positions is not None and (positions.ndim != 2 or positions.shape[1] != ids.shape[1]):
        return "its position ids are not those of (batch, tokens)"
    asked = [name for name in ("output_hidden_states", "output_attentions", "use_cache") if kwargs.get(name)]
    if kwargs.get("past_key_values") is not None or asked:
        return f"it is asked for {', '.join(asked) or 'a cache'}"
    return None
