"""What replay makes of padding: it is skipped where a packed forward of the very model equals a padded one.

Legend: B batch, T tokens of a padded sequence, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._compat import forget_forwards, shard_again
from .compaction import CompactExperts, RealRows
from .packing import PackedAttention, PackedBatch, why_padded
from .patches import ActivePass, Pass
from .probe import input_device
from .self_check import evaluating

if TYPE_CHECKING:
    from .router_replay import RouterReplay

PADDINGS = ("keep", "auto")
_MASK = ((0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0), (1,) * 11, (0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0))  # of unequal lengths
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the largest; coarser types round at 2^-8
_COARSE = 5e-2


def check_padding(padding: str) -> None:
    """Refuse a setting that does not exist."""
    if padding not in PADDINGS:
        raise ValueError(f"`padding` is {padding!r}, expected one of {PADDINGS}.")


class Padding:
    """
    What a handle that may skip padding makes of it.

    Args:
        stack (`torch.nn.Module`):
            The module above the decoder layers.
        active ([`ActivePass`]):
            The pass that a thread is in.
    """

    def __init__(self, stack: nn.Module, active: ActivePass):
        self.stack, self.active = stack, active
        self.why: str | None = "not tried yet"
        self.why_not_last: str | None = None  # what spoke against it in the last forward alone
        self._attention: PackedAttention | None = None
        self._experts: CompactExperts | None = None

    def __str__(self) -> str:
        if self.why is None:
            return "skipped"
        return f"{'kept' if self._experts is None else 'skipped by experts only'}: {self.why}"

    def try_skipping(self, model: nn.Module, replay: RouterReplay) -> None:
        """Skip it from now on, by all modules or by the experts, if the model allows."""
        self._attention = PackedAttention(self.stack, self.active)
        try:
            self.why = self._why_not(model, replay, self._attention)
            if self.why is not None:
                self.remove()
                self._try_experts(model, replay)
        except BaseException:
            replay.remove()
            raise

    def remove(self) -> None:
        """Give attention and experts back."""
        for part in (self._attention, self._experts):
            if part is not None:
                part.remove()
        self._attention = self._experts = None

    def packed(self, args: tuple, kwargs: dict[str, Any]) -> PackedBatch | None:
        """Where the real tokens of a forward are, if it goes over these alone."""
        if self.why is not None:
            return None
        self.why_not_last = why_padded(args, kwargs)
        return None if self.why_not_last else PackedBatch.of(kwargs["attention_mask"])

    def around(
        self, pass_: Pass, packed: PackedBatch | None, forward: Callable, main: Tensor, kwargs: dict[str, Any]
    ) -> Callable:
        """The forward of the stack over real tokens alone, or one of a padded batch `main` whose experts see these."""
        if packed is None:
            if self._experts is not None:
                pass_.real = RealRows.of(kwargs.get("attention_mask"), main)
            return forward
        attention = self._attention
        assert attention is not None  # or nothing is packed
        pass_.lengths = packed.lengths

        def run(**kwargs: Any) -> Any:
            output = packed.forward(forward, kwargs)
            if pass_.attended != attention.expected:
                raise RuntimeError(
                    f"attention ran {pass_.attended} times in a packed forward, expected {attention.expected}: some "
                    "of it may have looked across sequences. Set `padding='keep'`."
                )
            return output

        return run

    def _why_not(self, model: nn.Module, replay: RouterReplay, attention: PackedAttention) -> str | None:
        """What speaks against packing."""
        if attention.implementation != "sdpa":
            return f"its attention is {attention.implementation!r}, and only 'sdpa' is packed"

        def between() -> str | None:
            attention.expected = attention.calls
            self.why = None
            if attention.calls:
                return attention.refused or None
            return "its attention is not the one that Transformers registers"

        why = _differs(model, replay, between)
        if why is None and self.why_not_last is not None:
            return f"{type(self.stack).__name__} stays padded where {self.why_not_last}"
        return why

    def _try_experts(self, model: nn.Module, replay: RouterReplay) -> None:
        why, self.why = self.why, "not tried yet"

        def between() -> None:
            self._experts = CompactExperts(self.stack, self.active)

        differs, experts = _differs(model, replay, between), self._experts
        if differs is None and experts is not None and experts.calls != len(replay.moe_layers):
            differs = f"{experts.calls} modules of experts ran, for {len(replay.moe_layers)} MoE layers"
        if differs is not None:
            self.remove()
            why = f"{why}; and without it in its experts, {differs}"
        self.why = why


def _differs(model: nn.Module, replay: RouterReplay, between: Callable[[], str | None]) -> str | None:
    """
    Score sequences of unequal length, padded on both sides, through experts of nobody, before and after a change.

    Args:
        model (`torch.nn.Module`):
            The model, attached.
        replay ([`RouterReplay`]):
            Its handle.
        between (`Callable`):
            Makes the change, or says what speaks against it.

    Returns:
        `str`, *optional*: How the logits of real tokens differ, what was raised, or what spoke against the change.
    """
    layout, device = replay.layout, input_device(model)
    mask_BT = torch.tensor(_MASK, device=device)
    vocab = model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
    ids_BT = (torch.arange(mask_BT.numel(), device=device).view_as(mask_BT) * 7 + 3) % vocab
    scores = torch.rand(*mask_BT.shape, len(layout.moe_layers), layout.num_experts, generator=_seeded())
    record_BTLK = scores.argsort(-1)[..., : layout.top_k]

    def logits() -> Tensor:
        with replay.replay(record_BTLK):
            output = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        return output.logits[mask_BT.bool()].detach()

    try:
        with evaluating(model):
            padded = logits()
            against = between()
            if against is not None:
                return against
            skipped = logits()
    except Exception as error:  # whatever it is, a padded forward does without
        return f"a packed forward raises {type(error).__name__} ({str(error)[:200]})"
    finally:
        shard_again(model)
        forget_forwards(model)
    difference = (skipped.double() - padded.double()).abs().max().item()
    allowed = _TOLERANCE.get(padded.dtype, _COARSE) * padded.abs().max().item()
    if not difference <= allowed:
        return f"packed and padded logits differ (by {difference:.2g}, where {allowed:.2g} is rounding)"
    return None


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)  # the global one belongs to the user
