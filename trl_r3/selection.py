"""Record or replace the expert selection inside one router's forward.

A router's only discrete act is a top-k over its experts. While its forward runs, that one call is intercepted: the ids
it returns are swapped for recorded ones, the values for the live scores at those ids. Everything else is the model's
own code.

Legend: N tokens of a forward (B * T), E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_TOPK = (torch.topk, torch.Tensor.topk)
_MASKED_FILL = (torch.masked_fill, torch.Tensor.masked_fill)


@dataclass
class TopKCall:
    """Arguments of a `torch.topk` call: over which columns, and how many of them."""

    scores: Tensor
    top_k: int
    dim: int

    @classmethod
    def parse(cls, args: tuple, kwargs: dict[str, Any]) -> TopKCall:
        """Read them however they were passed."""
        names = ("input", "k", "dim")
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        return cls(bound["input"], int(bound["k"]), int(bound.get("dim", -1)))

    @property
    def columns(self) -> int:
        """Size of the dimension that is selected from."""
        return self.scores.shape[self.dim]


class TopKWatch(TorchFunctionMode):
    """
    Calls `on_topk(call, result)` after each `torch.topk` under it; what that returns takes the place of the result.

    Args:
        on_topk (`Callable`):
            Receives the [`TopKCall`], the function that ran it, and the arguments.
    """

    def __init__(self, on_topk: Callable[[TopKCall, Callable, tuple, dict], Any]):
        super().__init__()
        self.on_topk = on_topk
        self._before_mask: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _TOPK:
            return self.on_topk(TopKCall.parse(args, kwargs), func, args, kwargs)
        result = func(*args, **kwargs)
        if func in _MASKED_FILL:
            self._before_mask.append((result, args[0]))
        return result

    def unmasked(self, scores: Tensor) -> Tensor:
        """
        The scores before groups or capacity were masked out.

        Masks only select. A gate that takes its weights from masked scores (group-limited DeepSeek-V2) would give an
        expert outside the live groups the weight 0, and its router no gradient.
        """
        for masked, source in reversed(self._before_mask):
            if masked is scores:
                return source
        return scores


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
    """

    name: str
    module: nn.Module
    layer: int
    num_experts: int
    top_k: int
    call_index: int
    ids_output: int | None

    def run(
        self, forward: Callable, args: tuple, kwargs: dict[str, Any], replayed_NK: Tensor | None, missing: int
    ) -> tuple[Any, Tensor]:
        """Like [`Router.intercept`], by the fastest means that the router allows."""
        return self.intercept(forward, args, kwargs, replayed_NK, missing)

    def intercept(
        self, forward: Callable, args: tuple, kwargs: dict[str, Any], replayed_NK: Tensor | None, missing: int
    ) -> tuple[Any, Tensor]:
        """
        Run the router's forward, selecting `replayed_NK` where it is given.

        Args:
            forward (`Callable`):
                The router's own forward.
            args, kwargs:
                Its arguments.
            replayed_NK (`torch.Tensor` of shape `(N, K)`, *optional*):
                Packed ids. A missing row selects live.
            missing (`int`):
                The value that marks a missing row.

        Returns:
            The output of the router, and the ids of shape `(N, K)` that it selected, or with `replayed_NK` would have
            selected live.

        Raises:
            `RuntimeError`: If the selection was not called as it was when the router was found.
        """
        if replayed_NK is None and self.ids_output is not None and not torch.is_grad_enabled():
            output = forward(*args, **kwargs)
            return output, output[self.ids_output].detach().reshape(-1, self.top_k)
        selection = _Selection(self, replayed_NK, missing)
        with selection.watch:
            output = forward(*args, **kwargs)
        if selection.live_NK is None:
            raise RuntimeError(
                f"{self.name} ({type(self.module).__name__}) made {selection.calls} top-k calls in a forward, but "
                f"selects with call {self.call_index + 1}: its experts were neither recorded nor replayed. Attach "
                "again after whatever changed the module."
            )
        return output, selection.live_NK


class _Selection:
    """The selection of one forward of one router."""

    def __init__(self, router: Router, replayed_NK: Tensor | None, missing: int):
        self.router = router
        self.replayed_NK = replayed_NK
        self.missing = missing
        self.calls = 0
        self.live_NK: Tensor | None = None
        self.watch = TopKWatch(self._on_topk)

    def _on_topk(self, call: TopKCall, func: Callable, args: tuple, kwargs: dict) -> Any:
        index, self.calls = self.calls, self.calls + 1
        if index != self.router.call_index:
            return func(*args, **kwargs)
        if (call.columns, call.top_k) != (self.router.num_experts, self.router.top_k):
            raise RuntimeError(
                f"{self.router.name} selects {call.top_k} of {call.columns} experts, but selected {self.router.top_k} "
                f"of {self.router.num_experts} when it was found. Attach again after whatever changed the module."
            )
        # Values are gathered in either case: a recompute replays what its forward recorded, and non-reentrant
        # checkpointing wants both to save the same tensors.
        with torch.no_grad():
            live = func(*args, **kwargs)[1]
            self.live_NK = live.reshape(-1, self.router.top_k)
            selected = live if self.replayed_NK is None else self._replayed_like(live)
        scores = self.watch.unmasked(call.scores)
        return torch.return_types.topk((scores.gather(call.dim, selected), selected))

    def _replayed_like(self, live: Tensor) -> Tensor:
        assert self.replayed_NK is not None
        ids = self.replayed_NK
        if ids.numel() != live.numel():
            raise RuntimeError(
                f"{self.router.name} routes {live.numel() // self.router.top_k} tokens, but the record has "
                f"{ids.shape[0]} rows. Pass a record with one row a token of the batch."
            )
        ids = ids.reshape(live.shape)
        return torch.where(ids == self.missing, live, ids.to(live.dtype))
