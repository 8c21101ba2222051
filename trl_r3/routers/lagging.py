"""Training whose tokens go where older routers send them: the selection lags, everything else is of now.

Legend: N tokens of a forward, K experts per token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._compat import edits, unseen_by_checkpoints
from ..records.record import RoutingLayout
from .passes import RecordingPass
from .router import Router


class OlderRouters:
    """
    The weights of routers, as they were some optimizer steps ago.

    A step is told by the weights themselves: they were changed since the last forward that builds a graph.

    Args:
        routers (sequence of [`Router`]):
            The routers of a model.
        lag (`int`, *optional*):
            How many steps. While fewer were taken, the oldest weights select. `None`: always those of `given`.
        given (mapping of `str` to `torch.Tensor`, *optional*):
            Weights of all routers, by their names in the model: older than those of now.

    Raises:
        `ValueError`: If the lag is negative, a router has no weights of its own that could be kept, or `given` is not
            of these routers.
    """

    def __init__(self, routers: Sequence[Router], lag: int | None, given: Mapping[str, Tensor] | None = None):
        if lag is not None and lag < 0:
            raise ValueError(f"`lag` is {lag}, but it counts optimizer steps back. Pass 0, or a positive number.")
        self.routers = routers
        self._ages = lag is not None
        self._versions: list[int] | None = None
        self._kept: deque[list[dict[str, Tensor]]] = deque(maxlen=1 if lag is None else lag + 1)
        for router in routers:
            _check(router)
        if given is not None:
            self._kept.append([_of(router, given) for router in routers])

    def note(self) -> None:
        """Keep the weights, if a step has changed them."""
        if not self._ages:
            return
        for router in self.routers:  # a trainer may have sharded them since
            _check(router)
        now = [_state(router.module) for router in self.routers]
        versions = [edits(each) for state in now for each in state.values()]
        if versions != self._versions or self._moved(now):
            self._versions = versions
            self._kept.append([{name: each.detach().clone() for name, each in state.items()} for state in now])

    def _moved(self, now: list[dict[str, Tensor]]) -> bool:
        """Whether they are others, though PyTorch counted no edit: kernels and DeepSpeed write past it."""
        pairs = (
            (own, kept[name]) for state, kept in zip(now, self._kept[-1], strict=True) for name, own in state.items()
        )
        moved = [(own.detach() != kept.to(own.device)).any() for own, kept in pairs]
        return bool(torch.stack([each.to(moved[0].device) for each in moved]).any())

    @contextmanager
    def at_work(self, index: int) -> Iterator[None]:
        """Let router `index` have its older weights inside."""
        module = self.routers[index].module
        if parametrize.is_parametrized(module):
            raise RuntimeError(
                f"{self.routers[index].name} computes its weights in each forward, so older ones cannot take their "
                "place. Train the router itself, without an adapter on it, or leave `lag` and `route_with` out."
            )
        own = _state(module)
        try:
            for name, kept in self._kept[0][index].items():
                is_parameter, each = isinstance(own[name], nn.Parameter), kept.to(own[name])  # an average is wider
                _put(module, name, nn.Parameter(each, requires_grad=False) if is_parameter else each)
            yield
        finally:
            for name, each in own.items():
                _put(module, name, each)


class LaggingPass(RecordingPass):
    """
    One forward whose selection older routers make, and the recomputes of its layers.

    Args:
        routers, layout:
            As in [`RecordingPass`].
        older ([`OlderRouters`]):
            Their weights.
    """

    def __init__(self, routers: Sequence[Router], layout: RoutingLayout, older: OlderRouters):
        super().__init__(routers, layout)
        older.note()
        self.older = older

    def _route(self, index: int, router: Router, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        with torch.no_grad(), unseen_by_checkpoints(), self.older.at_work(index):
            _, self.live[index] = router.record(forward, args, kwargs)
        return self._recompute(router, forward, args, kwargs, self.live[index].to(self.layout.storage_dtype))

    def _recompute(
        self, router: Router, forward: Callable, args: tuple, kwargs: dict[str, Any], executed_NK: Tensor
    ) -> Any:
        return router.replay(forward, args, kwargs, executed_NK, compare=False).output


def _state(module: nn.Module) -> dict[str, Tensor]:
    return dict(chain(module.named_parameters(), module.named_buffers()))


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, value)


def _of(router: Router, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a router among those of a model: what is changed in them later selects, too."""
    found = {}
    for name, own in _state(router.module).items():
        older = given.get(f"{router.name}.{name}")
        if older is None or older.shape != own.shape:
            shape = "nothing" if older is None else f"a tensor of shape {tuple(older.shape)}"
            raise ValueError(
                f"`route_with` has {shape} for {router.name}.{name}, which is of shape {tuple(own.shape)}. Pass "
                "the weights of all routers by their names in the model, as a copy of `model.state_dict()` has them."
            )
        if older.untyped_storage().data_ptr() == own.untyped_storage().data_ptr():
            raise ValueError(
                f"`route_with` has {router.name}.{name} of the model itself, as `model.state_dict()` returns it: each "
                "step would change it, too, and nothing would lag. Pass copies, such as `copy.deepcopy` makes."
            )
        found[name] = older.detach()
    return found


def _check(router: Router) -> None:
    """Refuse a router whose older weights cannot be kept beside its own."""
    names = [name.rpartition(".")[2] for name, _ in router.module.named_modules()]
    if "experts" in names:
        raise ValueError(
            f"{router.name} ({type(router.module).__name__}) selects in the module that holds the experts, so its "
            "older weights would be those of the experts, too. Leave `lag` and `route_with` out."
        )
    state = _state(router.module)
    odd = next((n for n, each in state.items() if type(each) not in (nn.Parameter, Tensor) or not each.numel()), None)
    if odd is not None:
        raise ValueError(
            f"{odd} of {router.name} is sharded, so no process holds the weights that select. Leave `lag` and "
            "`route_with` out, or train with whole routers on each process (DDP)."
        )
