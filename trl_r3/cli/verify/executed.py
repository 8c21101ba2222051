"""Which experts ran in the forwards of `verify`, and which of them are not those of the record.

Legend: B samples, T tokens of a padded sequence, N = B * T, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...routers.router_replay import RouterReplay
from ..experts import experts_of, watched_experts


@dataclass
class Executed:
    """
    What ran in some forwards.

    Args:
        ids (`dict[int, list[torch.Tensor]]` of shape `(N, K)` each):
            By decoder layer, a tensor a call, recomputes included.
        with_weights (`dict[int, int]`):
            By decoder layer, how many experts have weights. A router may know more, which skip the token; a block may
            pass any id for these.
    """

    ids: dict[int, list[Tensor]] = field(default_factory=dict)
    with_weights: dict[int, int] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        """How often the experts of a layer ran, at least."""
        return min((len(calls) for calls in self.ids.values()), default=0)

    def other_rows(self, record: Tensor, moe_layers: list[int]) -> dict[int, int]:
        """
        How many recorded rows ran through another set of experts, over all calls.

        Args:
            record (`torch.Tensor` of shape `(B, T, L, K)`):
                Recorded ids; -1 where there is no row.
            moe_layers (`list[int]`):
                Decoder layers of its slots.

        Returns:
            `dict[int, int]`: By decoder layer, without those that nothing was seen of.
        """
        found: dict[int, int] = {}
        for slot, layer in enumerate(moe_layers):
            expected_NK = record[:, :, slot].flatten(0, 1).long().sort(-1).values
            there_N = expected_NK[:, 0] >= 0
            if layer in self.with_weights:
                there_N &= expected_NK[:, -1] < self.with_weights[layer]
            for ids in self.ids.get(layer, []):
                differs_N = (ids.long().sort(-1).values != expected_NK).any(-1) & there_N
                found[layer] = found.get(layer, 0) + int(differs_N.sum())
        return found


@contextmanager
def watch_experts(model: nn.Module, replay: RouterReplay) -> Iterator[Executed]:
    """
    Note the ids that reach the experts.

    Where the experts are not given ids, those that the router returns are noted.
    """
    executed, by_router = Executed(), Executed()

    def at_experts(layer: int, ids: Tensor) -> None:
        if layer in replay.moe_layers and ids.shape[-1] == replay.top_k:
            executed.ids.setdefault(layer, []).append(ids.reshape(-1, replay.top_k).cpu())

    def at_router(layer: int, place: int) -> Callable:
        def note(module: nn.Module, args: tuple, output: Any) -> None:
            by_router.ids.setdefault(layer, []).append(output[place].detach().reshape(-1, replay.top_k).cpu())

        return note

    executed.with_weights = {
        layer: _experts_with_weights(module, replay.num_experts)
        for layer, module in experts_of(model).items()
        if layer in replay.moe_layers
    }
    handles = [
        router.module.register_forward_hook(at_router(router.layer, router.ids_output))
        for router in replay.routers
        if router.ids_output is not None
    ]
    try:
        with watched_experts(model, at_experts):
            yield executed
    finally:
        for handle in handles:
            handle.remove()
        for layer, calls in by_router.ids.items():
            executed.ids.setdefault(layer, calls)


def _experts_with_weights(experts: nn.Module, num_experts: int) -> int:
    """How many of a router's experts a module says to hold; all of them, if it says nothing."""
    told = (vars(module).get("num_experts") for module in experts.modules())
    return min([count for count in told if isinstance(count, int)] + [num_experts])
