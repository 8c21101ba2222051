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
from ._compat_routers import rope_by_length
from .compaction import CompactExperts, RealRows
from .packing import PackedAttention, PackedBatch, has_holes
from .padding_trial import PaddingTrial
from .patches import ActivePass, CurrentModules, Pass
from .trimming import TrimmedBatch
from .watchers import Watchers
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
        current ([`CurrentModules`]):
            Of the module above the decoder layers.
        active ([`ActivePass`]):
            The pass that a thread is in.
    """

    def __init__(self, current: CurrentModules, active: ActivePass):
        self.current, self.stack, self.active = current, current.stack, active
        self.mode = "none"  # who skips it in a forward that can be packed: "all" layers, their "experts", or "none"
        self.why: str | None = "not tried yet"
        self.kept_by: str | None = None  # who watched the last pass
        self._packs = False  # whether forwards that can be packed are
        self._trims = False  # whether those that cannot lose the columns that are padding for all
        self._why_not_trimmed: str | None = None
        self._why_padded: str | None = None  # what of the last forward spoke against either
        self._said: set[str] = set()
        self._attention: PackedAttention | None = None
        self._experts: CompactExperts | None = None
        self._watchers: Watchers | None = None

    def __str__(self) -> str:
        kept_by = self.kept_by if self._watchers is None else self._watchers.find()
        if kept_by is not None:
            return f"kept: {kept_by}"
        if self.why is None:
            return "skipped"
        done = {"all": "skipped, but kept in rollouts", "experts": "skipped by experts only", "none": "kept"}
        if self.mode == "all" or (self.mode == "none" and self._why_not_trimmed == self.why):  # said once
            return f"{done[self.mode]}: {self.why}"
        columns = "trimmed" if self._trims else f"kept: {self._why_not_trimmed}"
        return f"{done[self.mode]}: {self.why} (columns behind all sequences are {columns})"

    @property
    def used(self) -> str:
        """What skipped padding in the last pass, or will in the first, as a trace names it."""
        if self.kept_by is not None:
            return "none"
        if self.mode == "all" or not self._trims:
            return self.mode
        return "columns" if self.mode == "none" else f"{self.mode}, columns"

    def try_skipping(self, model: nn.Module, replay: RouterReplay) -> None:
        """
        Skip it from now on, by all modules and, where these cannot, by the experts, if the model allows.

        Nothing is tried in front of a watcher, who would count the rows of the trial with those of a batch. One that
        comes with a forward is seen in the padded run, and nothing more is tried.
        """
        try:
            watchers = Watchers(model, self.current, [router.module for router in replay.routers])
            self.kept_by = watchers.find()
            if self.kept_by is not None:
                self.why = self._why_not_trimmed = f"not tried, as {self.kept_by}"
                self._watchers = watchers
                return
            trial = PaddingTrial(model, replay, watchers)
            self._attention = PackedAttention(self.stack, self.active)
            self.why = self._why_not_trimmed = trial.pad()
            if self.why is None:
                self._try_all(trial, len(replay.moe_layers))
            if not self._packs:
                self._attention.remove()
                self._attention = None
            self._watchers = watchers
        except BaseException:
            replay.remove()
            raise

    def _try_all(self, trial: PaddingTrial, num_layers: int) -> None:
        rope = rope_by_length(self.stack)
        by_length = f"its positions are scaled by the length of a batch ({rope!r})" if rope else None
        by_all, by_experts = by_length or self._try_packing(trial), self._try_experts(trial, num_layers)
        self._why_not_trimmed = by_length or (by_all and self._try_trimming(trial))
        self._trims = by_all is not None and self._why_not_trimmed is None
        self._packs = by_all is None
        self.mode = "all" if self._packs else "experts" if by_experts is None else "none"
        both = f"{by_all}; and without it in its experts, {by_experts}"
        self.why = both if by_all and by_experts else by_all or by_experts

    def remove(self) -> None:
        """Give attention and experts back."""
        if self._watchers is not None:
            self.kept_by, self._watchers = self._watchers.find(), None
        for part in (self._attention, self._experts):
            if part is not None:
                part.remove()
        self._attention = self._experts = None

    def say(self) -> None:
        """Tell the log what is made of it."""
        level = logging.INFO if self.why is None and self.kept_by is None else logging.WARNING
        _logger.log(level, "in routing replay, padding is %s", str(self))
        if self.kept_by is not None:
            self._said.add(self.kept_by)

    def rows(
        self, source: RecordSource, main: Tensor, args: tuple, kwargs: dict[str, Any]
    ) -> PackedBatch | TrimmedBatch | RealRows | None:
        """What of a forward over `main` all layers see, or only the experts; `None` where all see all of it."""
        mask, shrinks = kwargs.get("attention_mask"), self._packs or self._trims
        self._why_padded = why_padded(args, kwargs, getattr(self.stack, "config", None)) if shrinks else None
        if not (shrinks or self._experts) or not torch.is_tensor(mask) or mask.shape != main.shape[:2]:
            return None
        if self._is_watched():
            return None
        real_BT = source.real(mask)
        if has_holes(real_BT):  # what is in them may be scored
            self._say_once("kept", "its attention mask has holes")
            return None
        if self._packs and self._why_padded is None:
            return PackedBatch.of(real_BT)
        trimmed = TrimmedBatch.of(real_BT, self._experts is not None) if self._trims else None
        if trimmed is not None and self._why_padded is None:
            return trimmed
        rows = self._of_experts(real_BT)
        if self._why_padded is not None and (trimmed or (rows and self._packs)):
            self._say_once("skipped by experts only" if rows else "kept", self._why_padded)
        return rows

    def of_experts(self, real_BT: Tensor | None) -> RealRows | None:
        """What of a padded forward experts see; `None` where they see all of it."""
        if self._experts is None or real_BT is None or self._is_watched():
            return None
        return self._of_experts(real_BT)

    def _of_experts(self, real_BT: Tensor) -> RealRows | None:
        return None if self._experts is None else RealRows.of(real_BT)

    def around(self, pass_: Pass, skips: PackedBatch | TrimmedBatch | RealRows | None, forward: Callable) -> Callable:
        """The forward of the stack that sees these only, or whose experts do."""
        if isinstance(skips, PackedBatch):
            pass_.lengths = skips.lengths
        else:
            pass_.real = skips.rows if isinstance(skips, TrimmedBatch) else skips
        attention = self._attention
        if attention is None and not isinstance(skips, TrimmedBatch):
            return forward

        def run(*args: Any, **kwargs: Any) -> Any:
            if isinstance(skips, (PackedBatch, TrimmedBatch)):
                output = skips.forward(forward, kwargs)
            else:
                output = forward(*args, **kwargs)
            if attention is not None:
                (attention.check if isinstance(skips, PackedBatch) else attention.meet)(pass_.attended)
            return output

        return run

    def _is_watched(self) -> bool:
        """Look who watches this pass, whose rows are those of the batch then."""
        self.kept_by = None if self._watchers is None else self._watchers.find()  # nobody is asked in a trial
        if self.kept_by is not None:
            self._say_once("kept", self.kept_by)
        return self.kept_by is not None

    def _say_once(self, what: str, why: str) -> None:
        """Of a forward that skips less than the model allows."""
        if why not in self._said and self._watchers is not None:  # a trial says it in the end
            self._said.add(why)
            _logger.warning("padding is %s in a forward: %s", what, why)

    def _try_packing(self, trial: PaddingTrial) -> str | None:
        """What speaks against packing."""
        attention = self._attention
        assert attention is not None  # it has seen the padded run
        why = attention.why_not()
        if why is None:
            self._packs = True
            why = trial.differs()
        if why is None and self._why_padded is not None:
            why = f"{type(self.stack).__name__} stays padded where {self._why_padded}"
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

    def _try_trimming(self, trial: PaddingTrial) -> str | None:
        """What speaks against cutting off columns that are padding for all sequences, beside what experts skip."""
        self._trims = True
        return trial.differs() or self._why_padded
