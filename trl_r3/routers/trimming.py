"""Columns of a padded batch behind the last real token of all its sequences: cut off, and padded again above.

Only on the right, where nothing that is real follows. Models may count blocks, chunks or states from the first column,
so that without columns on the left they would compute something else, which the few tokens of a trial do not show.

Legend: B batch, T tokens of a padded sequence, W of them that are left, N = B * T, M observed rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .compaction import RealRows

_CUT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


class TrimmedBatch:
    """
    The columns that are left of a padded batch.

    Args:
        real_BT (`torch.BoolTensor` of shape `(B, T)`):
            Which tokens are real, on the host.
        left (`int`):
            W.
        by_experts (`bool`):
            Whether experts skip what padding is left.
    """

    def __init__(self, real_BT: Tensor, left: int, by_experts: bool):
        self.size, self.left = (real_BT.shape[0], real_BT.shape[1]), left
        self.rows = RealRows.of(real_BT[:, :left]) if by_experts else None
        """Those of them that experts see, where they do not see all."""

    @classmethod
    def of(cls, real_BT: Tensor, by_experts: bool) -> TrimmedBatch | None:
        """Of the tokens that are real, on the host; `None` where there is nothing to cut, or nothing else."""
        left = _width(real_BT)
        return cls(real_BT, left, by_experts) if 0 < left < real_BT.shape[1] else None

    def take(self, values_N: Tensor) -> Tensor:
        """(B * W, ...) of `(B * T, ...)`."""
        return values_N.unflatten(0, self.size)[:, : self.left].flatten(0, 1)

    def place(self, rows_M: Tensor | None) -> Tensor | None:
        """Where real rows of the padded batch are among those that are left."""
        if rows_M is None:
            return None
        width = self.size[1]
        return rows_M // width * self.left + rows_M % width

    def forward(self, forward: Callable, kwargs: dict[str, Any]) -> Any:
        """Run the module over what is left; its output is that of the whole batch, zero where it was cut."""
        width, left = self.size[1], self.left
        cut = {name: kwargs[name] for name in _CUT if kwargs.get(name) is not None}
        cut = {name: value[:, :left] if name == "inputs_embeds" else value[..., :left] for name, value in cut.items()}
        output = forward(**{**kwargs, **cut, "use_cache": False})  # a config may want one, which would be as short
        output.last_hidden_state = F.pad(output.last_hidden_state, (0, 0, 0, width - left))
        if output.get("router_logits") is not None:
            output.router_logits = tuple(map(self.padded, output.router_logits))
        return output

    def padded(self, values: Tensor) -> Tensor:
        """(B * T, ...) of `(B * W, ...)`: zeros where it was cut."""
        width, left = self.size[1], self.left
        whole = F.pad(values.reshape(self.size[0], left, -1), (0, 0, 0, width - left))
        return whole.view(self.size[0] * width, *values.shape[1:])


def _width(real_BT: Tensor) -> int:
    """Columns up to the last that is real in any sequence."""
    columns = real_BT.any(0).nonzero()
    return int(columns.max()) + 1 if len(columns) else 0
