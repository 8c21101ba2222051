"""What replay makes of padding: it is skipped where a forward and a backward of the very model equal padded ones.

Legend: B batch, T tokens of a padded sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..records.sources import RecordSource
from .compaction import CompactExperts, RealRows
from .packing import PackedAttention, PackedBatch, has_holes
from .padding_trial import PaddingTrial
from .patches import ActivePass, Pass
from .why_padded import why_padded

if TYPE_CHECKING:
    from .router_replay import RouterReplay

PADDINGS = ("keep", "auto")

_logger = logging.getLogger(__name__)


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
        self.mode = "none"  # who skips it in a forward that can be packed: "all" layers, their "experts", or "none"
        self.why: str | None = "not tried yet"
        self._packs = False  # whether forwards that can be packed are
        self._why_not_packed: str | None = None  # what spoke against it in the last forward
        self._said: set[str] = set()
        self._attention: PackedAttention | None = None
        self._experts: CompactExperts | None = None

    def __str__(self) -> str:
        if self.why is None:
            return "skipped"
        done = {"all": "skipped, but kept in rollouts", "experts": "skipped by experts only", "none": "kept"}
        return f"{done[self.mode]}: {self.why}"

    def try_skipping(self, model: nn.Module, replay: RouterReplay) -> None:
        """Skip it from now on, by all modules and, where these cannot, by the experts, if the model allows."""
        try:
            trial = PaddingTrial(model, replay)
            self._attention = PackedAttention(self.stack, self.active)
            self.why = trial.pad()
            if self.why is None:
                by_all, by_experts = self._try_packing(trial), self._try_experts(trial, len(replay.moe_layers))
                self._packs = by_all is None
                self.mode = "all" if self._packs else "experts" if by_experts is None else "none"
                both = f"{by_all}; and without it in its experts, {by_experts}"
                self.why = both if by_all and by_experts else by_all or by_experts
            if not self._packs:
                self._attention.remove()
                self._attention = None
        except BaseException:
            replay.remove()
            raise

    def remove(self) -> None:
        """Give attention and experts back."""
        for part in (self._attention, self._experts):
            if part is not None:
                part.remove()
        self._attention = self._experts = None

    def rows(
        self, source: RecordSource, main: Tensor, args: tuple, kwargs: dict[str, Any]
    ) -> PackedBatch | RealRows | None:
        """What of a forward over `main` all layers see, or only the experts; `None` where all see all of it."""
        mask = kwargs.get("attention_mask")
        self._why_not_packed = why_padded(args, kwargs) if self._packs else None
        if not (self._packs or self._experts) or not torch.is_tensor(mask) or mask.shape != main.shape[:2]:
            return None
        real_BT = source.real(mask)
        if has_holes(real_BT):  # what is in them may be scored
            self._say_once("kept", "its attention mask has holes")
            return None
        if self._packs and self._why_not_packed is None:
            return PackedBatch.of(real_BT)
        rows = self.of_experts(real_BT)
        if self._why_not_packed is not None and rows is not None:
            self._say_once("skipped by experts only", self._why_not_packed)
        return rows

    def of_experts(self, real_BT: Tensor | None) -> RealRows | None:
        """What of a padded forward experts see; `None` where they see all of it."""
        return None if self._experts is None or real_BT is None else RealRows.of(real_BT)

    def around(self, pass_: Pass, skips: PackedBatch | RealRows | None, forward: Callable) -> Callable:
        """The forward of the stack that sees these only, or whose experts do."""
        if isinstance(skips, RealRows):
            pass_.real = skips
        elif skips is not None:
            pass_.lengths = skips.lengths
        attention = self._attention
        if attention is None:
            return forward

        def run(*args: Any, **kwargs: Any) -> Any:
            if not isinstance(skips, PackedBatch):
                output = forward(*args, **kwargs)
                attention.meet(pass_.attended)
                return output
            output = skips.forward(forward, kwargs)
            attention.check(pass_.attended)
            return output

        return run

    def _say_once(self, what: str, why: str) -> None:
        """Of a forward that skips less than the model allows."""
        if why not in self._said:
            self._said.add(why)
            _logger.warning("padding is %s in a forward that replays: %s", what, why)

    def _try_packing(self, trial: PaddingTrial) -> str | None:
        """What speaks against packing."""
        attention = self._attention
        assert attention is not None  # it has seen the padded run
        why = attention.why_not()
        if why is None:
            self._packs = True
            why = trial.differs()
        if why is None and self._why_not_packed is not None:
            why = f"{type(self.stack).__name__} stays padded where {self._why_not_packed}"
        self._packs = False
        return why

    def _try_experts(self, trial: PaddingTrial, num_layers: int) -> str | None:
        """What speaks against taking rows of padding out before the experts."""
        experts = self._experts = CompactExperts(self.stack, self.active)
        why = trial.differs()
        if why is None and (not experts.calls or experts.calls % num_layers):  # more than one each with recomputes
            why = f"{experts.calls} modules of experts ran, for {num_layers} MoE layers"
        if why is not None:
            experts.remove()
            self._experts = None
        return why
