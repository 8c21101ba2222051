"""One forward of a model whose routers are watched, and the recomputes of its layers.

Legend: B batch, T tokens of a sequence, N tokens of a forward (B * T), M observed rows, L MoE layers, K experts per
token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._compat import unseen_by_checkpoints
from ..gating import RowStatus
from ..records.metrics import changed_layers
from ..records.record import RoutingLayout, missing_rows, unpack
from .compaction import RealRows
from .gated import GatedRouter
from .router import Router


class LivePass:
    """A forward that routes live."""

    replays = False
    lengths: list[int] | None = None
    attended = 0
    real: RealRows | None = None

    def route(self, index: int, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The router's own forward."""
        return forward(*args, **kwargs)


class RecordingPass(LivePass):
    """
    One forward through the decoder stack that records, and the recomputes of its layers in backward.

    Args:
        routers (sequence of [`Router`]):
            The routers of the model, by ascending layer.
        layout ([`RoutingLayout`]):
            Its layers and experts.
    """

    def __init__(self, routers: Sequence[Router], layout: RoutingLayout):
        self.routers = routers
        self.layout = layout
        self.fired = [0] * len(routers)
        self.live: dict[int, Tensor] = {}  # by MoE layer: (N, K)
        self.executed: tuple[Tensor, ...] | None = None  # once closed, by MoE layer: (N, K) that a recompute replays

    def route(self, index: int, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run router `index` as this pass wants it; a recompute goes through the experts that its forward did."""
        router = self.routers[index]
        if self.executed is not None:
            executed_NK = self._on(self.executed[index], args, kwargs)
            return self._recompute(router, forward, args, kwargs, executed_NK)
        self.fired[index] += 1
        return self._route(index, router, forward, args, kwargs)

    def _route(self, index: int, router: Router, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        output, self.live[index] = router.record(forward, args, kwargs)
        return output

    def _recompute(
        self, router: Router, forward: Callable, args: tuple, kwargs: dict[str, Any], executed_NK: Tensor
    ) -> Any:
        return router.repeat(forward, args, kwargs, executed_NK)

    def _on(self, ids: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        # layers may be spread over devices
        device = next(value.device for value in (*args, *kwargs.values()) if torch.is_tensor(value))
        if ids.device == device:
            return ids
        with unseen_by_checkpoints():
            return ids.to(device)

    def close(self) -> Tensor:
        """
        End the forward.

        Returns:
            `torch.Tensor` of shape `(N, L, K)`: Packed ids that it executed, missing where a row went to no expert.

        Raises:
            `RuntimeError`: If it did not go through every router once.
        """
        self._check_fired()
        selected_NLK = self._stacked(self.live).to(self.layout.storage_dtype)
        self.live = {}
        self.executed = selected_NLK.unbind(1)
        return selected_NLK if self.real is None else self.real.only(selected_NLK, self.layout.missing)

    def _stacked(self, by_layer: dict[int, Tensor]) -> Tensor:
        tensors = [by_layer[index] for index in sorted(by_layer)]
        return torch.stack([tensor.to(tensors[0].device) for tensor in tensors], dim=1)

    def _check_fired(self) -> None:
        for router, fired in zip(self.routers, self.fired, strict=True):
            if fired != 1:
                raise RuntimeError(
                    f"{router.name} ({type(router.module).__name__}) ran {fired} times in a forward, expected 1: its "
                    f"selection was {'not' if fired == 0 else 'more than once'} replayed. A fused block, a swapped "
                    "kernel or a replaced module bypasses it; undo that, or attach after it."
                )


class ReplayingPass(RecordingPass):
    """
    One forward that goes through recorded experts.

    Args:
        routers, layout:
            As in [`RecordingPass`].
        replayed_NLK (`torch.Tensor` of shape `(N, L, K)`):
            Packed ids, on the device of the forward.
        has_missing (`bool`):
            Whether a row may be missing.
        observed_M (`torch.Tensor` of shape `(M,)`, *optional*):
            Rows whose live selection is asked for.
        scores (`bool`, *optional*, defaults to `False`):
            Whether the scores of the recorded experts are asked for, of routers that the op gates.
    """

    replays = True

    def __init__(
        self,
        routers: Sequence[Router],
        layout: RoutingLayout,
        replayed_NLK: Tensor,
        has_missing: bool,
        observed_M: Tensor | None = None,
        scores: bool = False,
    ):
        super().__init__(routers, layout)
        for router in routers:
            router.check_unchanged()
        self.scores: dict[int, Tensor] | None = {} if scores else None  # by MoE layer: (N, K), logarithms
        self.observed_M = None if observed_M is None else observed_M.to(replayed_NLK.device)
        self.observed: dict[int, Tensor] = {}  # by MoE layer: (M, K)
        self.replayed_LNK = replayed_NLK.transpose(0, 1).contiguous()
        self.replayed = self.replayed_LNK.unbind(0)
        self.missing_N1 = missing_rows(replayed_NLK, layout)[:, None] if has_missing else None
        self.status: dict[int, Tensor] = {}  # by MoE layer: (N,)
        # by MoE layer: (N, K) that ran, for recomputes, where it may be other rows than the record's
        self.ran: dict[int, Tensor] | None = {} if has_missing and torch.is_grad_enabled() else None

    def _route(self, index: int, router: Router, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        replayed_NK, missing_N1 = self._on(self.replayed[index], args, kwargs), self.missing_N1
        if missing_N1 is not None:
            missing_N1 = self._on(missing_N1, args, kwargs)
        routed = router.replay(forward, args, kwargs, replayed_NK, missing_N1)
        if self.observed_M is not None:
            observed_M = self._on(self.observed_M, args, kwargs)
            with unseen_by_checkpoints():
                self.observed[index] = router.live_ids(routed, observed_M)
        if self.scores is not None:
            assert isinstance(router, GatedRouter)  # or they are not asked for
            with torch.no_grad(), unseen_by_checkpoints():
                self.scores[index] = router.log_scores(routed, replayed_NK)
        if routed.live_NK is not None:
            self.live[index] = routed.live_NK
        if routed.status_N is not None:
            self.status[index] = routed.status_N
        if self.ran is not None:
            assert routed.executed_NK is not None  # rows may be missing
            self.ran[index] = routed.executed_NK
        return routed.output

    def _recompute(
        self, router: Router, forward: Callable, args: tuple, kwargs: dict[str, Any], executed_NK: Tensor
    ) -> Any:
        return router.replay(forward, args, kwargs, executed_NK, compare=False).output

    def observed_live(self) -> Tensor | None:
        """(M, L, K) ids of the live selection in the observed rows, if any are."""
        return self._stacked(self.observed) if self.observed else None

    def log_scores(self) -> Tensor:
        """(N, L, K) logarithms of the scores of the recorded experts, which were asked for."""
        assert self.scores is not None  # asked for
        return self._stacked(self.scores)

    def close(self) -> Tensor:
        """
        End the forward.

        Returns:
            `torch.BoolTensor` of shape `(N, L)`: Where the live selection is another set than the record. Missing rows
            say nothing.

        Raises:
            `RuntimeError`: If it did not go through every router once.
        """
        self._check_fired()
        changed = []
        order = [*sorted(self.live), *sorted(self.status)]
        if self.live:
            live_NLK = self._stacked(self.live).to(self.replayed_LNK.device)
            recorded_NLK = (self.replayed_LNK[sorted(self.live)] if self.status else self.replayed_LNK).transpose(0, 1)
            changed.append(changed_layers(live_NLK, recorded_NLK))
            self.live = {}
        if self.status:
            changed.append(self._stacked(self.status).to(self.replayed_LNK.device) == RowStatus.DIFFERS_LIVE)
            self.status = {}
        self.executed = self.replayed
        if self.ran:
            ran_NLK = self._stacked(self.ran).to(self.replayed_LNK.dtype)
            self.executed, self.ran = ran_NLK.transpose(0, 1).contiguous().unbind(0), None  # as the record is laid out
        if len(changed) == 1:
            return changed[0]
        return torch.cat(changed, dim=1)[:, sorted(range(len(order)), key=order.__getitem__)]


# from size and attention mask of a forward, the (B, T) of `bool` on the host: which of its tokens are real
WhichAreReal = Callable[[Sequence[int], Any], Tensor | None]


@dataclass
class RecordedRoutes:
    """What [`RouterReplay.record`] yields: the selections of all forwards inside it."""

    layout: RoutingLayout
    forwards: list[Tensor] = field(default_factory=list)  # packed (B, T_i, L, K)
    tokens: list[Tensor | None] = field(default_factory=list)  # (B, T_i), where the forward was given input ids
    positions: list[Tensor | None] = field(default_factory=list)  # likewise of position ids
    real: WhichAreReal | None = None

    def add(self, routes: Tensor, *given: Tensor | None) -> None:
        """Take a forward, with its input ids and position ids."""
        self.forwards.append(routes)
        for kept, ids in zip((self.tokens, self.positions), given, strict=True):
            kept.append(None if ids is None else ids.clone())  # a view would keep its base

    @property
    def packed(self) -> Tensor:
        """(B, T, L, K) packed: the forwards so far, concatenated along the sequence."""
        if not self.forwards:
            raise RuntimeError(
                "no forward ran inside `record()`, so there is nothing to read. Call the model inside it."
            )
        sizes = {forward.shape[0] for forward in self.forwards}
        if len(sizes) != 1:
            raise RuntimeError(
                f"the forwards inside `record()` had batch sizes {sorted(sizes)}, which cannot be concatenated along "
                "the sequence. Record batches of different sizes separately."
            )
        return torch.cat(self.forwards, dim=1)

    @property
    def routed_experts(self) -> Tensor:
        """
        `torch.Tensor` of shape `(B, T, L, K)`, `torch.int16`: the forwards so far, concatenated along the sequence.
        """
        return unpack(self.packed, self.layout)


@dataclass
class TrainingGuard:
    """
    Watches the forwards of a training step that build a graph: each replays, or is let go live on purpose.

    Args:
        allows_live (`bool`, *optional*, defaults to `False`):
            Whether a live forward is on purpose now.
    """

    allows_live: bool = False
    replayed: int = 0  # forwards
    live: int = 0  # forwards
    live_rows: int = 0

    @contextmanager
    def live_on_purpose(self) -> Iterator[None]:
        """Let forwards inside go live."""
        before, self.allows_live = self.allows_live, True
        try:
            yield
        finally:
            self.allows_live = before

    def meet_live(self, batch_size: int, num_tokens: int) -> None:
        """Count a live forward, or refuse it."""
        if not self.allows_live:
            raise RuntimeError(
                f"a forward of the policy over {batch_size} x {num_tokens} tokens builds a graph in a training step, "
                "but replays nothing: its update would come from other experts than the rollout. Score through the "
                "trainer's own `_get_per_token_logps_and_entropies` with the whole batch, or let it go live on "
                "purpose inside `with trainer.live_routing():`."
            )
        self.live += 1
        self.live_rows += batch_size * max(num_tokens - 1, 0)
