"""One router of a model: record or replace the expert selection inside its forward.

A router's only discrete act is a top-k over its experts. While its forward runs, that one call is intercepted: the ids
it returns are swapped for recorded ones, the values for the live scores at those ids. Everything else is the model's
own code.

Legend: N tokens of a forward (B * T), E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .._compat import unseen_by_checkpoints
from .top_k import ReboundForward, TopKCall, TopKWatch


class Routed(NamedTuple):
    """
    What a router did in one forward that replayed.

    Args:
        output (`Any`):
            Its output.
        live_NK (`torch.Tensor` of shape `(N, K)`, *optional*):
            Ids of its live selection, where it was asked for.
        status_N (`torch.Tensor` of shape `(N,)` and dtype `torch.uint8`, *optional*):
            How each row was gated, a [`RowStatus`], in its place where [`masked_topk_gating`] gated.
        executed_NK (`torch.Tensor` of shape `(N, K)`, *optional*):
            Ids that ran, where rows could be missing.
    """

    output: Any
    live_NK: Tensor | None = None
    status_N: Tensor | None = None
    executed_NK: Tensor | None = None


@dataclass
class Router:
    """
    A router of a model and the call in its forward that selects experts.

    Args:
        name (`str`):
            Path of the module in the model.
        module (`torch.nn.Module`):
            The module that calls `torch.topk`.
        layer (`int`):
            Index of its decoder layer.
        num_experts (`int`):
            Number of experts E it selects from.
        top_k (`int`):
            Number of experts K it selects.
        call_index (`int`):
            Which of the top-k calls of one forward selects experts (others select groups).
        ids_output (`int`, *optional*):
            Where in its output tuple the selected ids are, unchanged.
        rebound ([`ReboundForward`], *optional*):
            Its forward with another top-k, where that does as much as watching it.
    """

    name: str
    module: nn.Module
    layer: int
    num_experts: int
    top_k: int
    call_index: int
    ids_output: int | None
    rebound: ReboundForward | None = None

    def record(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
        """
        Run the router's forward and tell what it selected.

        Args:
            forward (`Callable`):
                The router's own forward.
            args, kwargs:
                Its arguments.

        Returns:
            Its output, and the ids of shape `(N, K)` that it selected.
        """
        if self.ids_output is not None and not torch.is_grad_enabled():
            output = forward(*args, **kwargs)
            ids = output[self.ids_output]
            if ids.shape[-1] != self.top_k:
                self.refuse(self.num_experts, ids.shape[-1])
            return output, ids if ids.ndim == 2 else ids.reshape(-1, self.top_k)
        output, live_NK, *_ = self._intercept(forward, args, kwargs, _Selection(self))
        assert live_NK is not None  # compared
        return output, live_NK

    def replay(
        self,
        forward: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        replayed_NK: Tensor,
        missing_N1: Tensor | None = None,
        compare: bool = True,
    ) -> Routed:
        """
        Run the router's forward with a given selection.

        Args:
            forward (`Callable`):
                The router's own forward.
            args, kwargs:
                Its arguments.
            replayed_NK (`torch.Tensor` of shape `(N, K)`):
                Packed ids.
            missing_N1 (`torch.BoolTensor` of shape `(N, 1)`, *optional*):
                Rows that select live. `None` where there are none.
            compare (`bool`, *optional*, defaults to `True`):
                Whether to tell the live selection, too.

        Returns:
            [`Routed`]: With `live_NK` or `status_N`, if `compare`.

        Raises:
            `RuntimeError`: If the selection was not called as it was when the router was found.
        """
        return self._intercept(forward, args, kwargs, _Selection(self, replayed_NK, missing_N1, compare))

    def check_unchanged(self) -> None:
        """Nothing: whatever its own forward computes with now, it computes with in a replay."""

    def repeat(self, forward: Callable, args: tuple, kwargs: dict[str, Any], executed_NK: Tensor) -> Any:
        """Run the router's forward again, with the `(N, K)` ids that [`Router.record`] told of it; its output."""
        # by the same code as there: non-reentrant checkpointing wants both to save the same tensors
        return self._intercept(forward, args, kwargs, _Selection(self, executed_NK, None, False)).output

    def live_ids(self, routed: Routed, rows_M: Tensor) -> Tensor:
        """(M, K) ids that a replaying forward would have selected live in some of its rows."""
        assert routed.live_NK is not None  # it compared
        return routed.live_NK[rows_M]

    def check_tokens(self, routed: int, tokens: int) -> None:
        """Refuse to route other tokens than those of the forward, each of which has one row of a record."""
        if routed != tokens:
            raise RuntimeError(
                f"{self.name} routes {routed} tokens in a forward over {tokens}, and a record has one row for each of "
                "these. Where tokens of images or audio have routers of their own, use batches of text alone, or set "
                "`use_routing_replay=False`."
            )

    def refuse(self, num_experts: int, top_k: int) -> NoReturn:
        """What raises if it selects otherwise than when it was found."""
        raise RuntimeError(
            f"{self.name} selects {top_k} of {num_experts} experts, but selected {self.top_k} of {self.num_experts} "
            "when it was found. Attach again after whatever changed the module."
        )

    def under(self, watch: TopKWatch, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the router's forward with the top-k calls of `watch`."""
        if self.rebound is not None and self.rebound.runs(forward):
            return self.rebound(watch.topk, self.module, args, kwargs)
        with watch:
            return forward(*args, **kwargs)

    def _intercept(self, forward: Callable, args: tuple, kwargs: dict[str, Any], selection: _Selection) -> Routed:
        output = self.under(selection, forward, args, kwargs)
        if not selection.made:
            raise RuntimeError(
                f"{self.name} ({type(self.module).__name__}) made {selection.calls} top-k calls in a forward, but "
                f"selects with call {self.call_index + 1}: its experts were neither recorded nor replayed. Attach "
                "again after whatever changed the module."
            )
        return Routed(output, selection.live_NK, executed_NK=selection.executed_NK)


class _Selection(TopKWatch):
    """The selection of one forward of one router."""

    def __init__(
        self,
        router: Router,
        replayed_NK: Tensor | None = None,
        missing_N1: Tensor | None = None,
        compare: bool = True,
    ):
        super().__init__(self._select)
        self.router = router
        self.replayed_NK = replayed_NK
        self.missing_N1 = missing_N1
        self.compare = compare
        self.calls = 0
        self.made = False
        self.live_NK: Tensor | None = None
        self.executed_NK: Tensor | None = None

    def _select(self, call: TopKCall, args: tuple, kwargs: dict) -> Any:
        index, self.calls = self.calls, self.calls + 1
        router = self.router
        if index != router.call_index:
            return torch.topk(*args, **kwargs)
        if (call.columns, call.top_k) != (router.num_experts, router.top_k):
            router.refuse(call.columns, call.top_k)
        self.made = True
        scores = self.unmasked(call.scores)
        with unseen_by_checkpoints():
            selected = self._selected(args, kwargs, (*scores.shape[:-1], router.top_k))
        # Values are gathered in either case: a recompute replays what its forward recorded, and non-reentrant
        # checkpointing wants both to save the same tensors.
        return torch.return_types.topk((scores.gather(call.dim, selected), selected))

    def _selected(self, args: tuple, kwargs: dict, shape: tuple[int, ...]) -> Tensor:
        replayed_NK, missing_N1 = self.replayed_NK, self.missing_N1
        if replayed_NK is not None:
            self.router.check_tokens(math.prod(shape[:-1]), replayed_NK.shape[0])
        if replayed_NK is not None and missing_N1 is None and not self.compare:
            return replayed_NK.long().view(shape)
        with torch.no_grad():  # of the live selection, only the ids
            live = torch.topk(*args, **kwargs)[1]
        live_NK = live if live.ndim == 2 else live.reshape(-1, self.router.top_k)
        if self.compare:
            self.live_NK = live_NK
        if replayed_NK is None:
            return live
        if missing_N1 is None:
            return replayed_NK.long().view(shape)
        self.executed_NK = torch.where(missing_N1, live_NK, replayed_NK)
        return self.executed_NK.view(shape)
