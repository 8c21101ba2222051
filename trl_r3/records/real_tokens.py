"""Which tokens of a batch are real, on the host: read from the device once, and known to all forwards of the batch.

Legend: B batch, T tokens of a padded sequence.
"""

from __future__ import annotations

from torch import Tensor

from .._compat import edits


class RealTokens:
    """
    An attention mask that was read on the host.

    A forward is given the mask of its batch, or a slice of it: what that says is known without waiting for the device,
    as long as nobody edits it.

    Args:
        mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            Where it was read from.
        real_BT (`torch.BoolTensor` of shape `(B, T)`, *optional*):
            What was read, where that came along with something else.
    """

    def __init__(self, mask: Tensor | None = None, real_BT: Tensor | None = None):
        self._keep(mask, real_BT)

    def of(self, mask: Tensor) -> Tensor:
        """
        What a mask says, read from the device only if it is no slice of the last one that was read.

        Args:
            mask (`torch.Tensor` of shape `(B, T)`):
                Nonzero where a token is real.

        Returns:
            `torch.BoolTensor` of shape `(B, T)`, on the host.
        """
        first, known_BT = self._first_row(mask), self._real_BT
        if first is not None and known_BT is not None:
            return known_BT[first : first + mask.shape[0]]
        real_BT = mask.detach().bool().cpu()
        self._keep(mask, real_BT)
        return real_BT

    def _keep(self, mask: Tensor | None, real_BT: Tensor | None) -> None:
        if mask is not None and mask.is_inference():  # which nobody counts the edits of
            mask = real_BT = None
        self._mask, self._real_BT = mask, real_BT
        self._version = None if mask is None else edits(mask)

    def _first_row(self, mask: Tensor) -> int | None:
        """Which row of the known mask is the first of this one, if it is a part of it."""
        known = self._mask
        if known is None or mask.is_inference() or edits(known) != self._version or _kind(known) != _kind(mask):
            return None
        row = known.stride(0) * known.itemsize or 1 << 62  # rows that are one, expanded, begin nowhere else
        first, within = divmod(mask.data_ptr() - known.data_ptr(), row)
        return first if within == 0 and 0 <= first <= known.shape[0] - mask.shape[0] else None


def _kind(mask: Tensor) -> tuple:
    return mask.device, mask.dtype, mask.stride(), mask.shape[1]
