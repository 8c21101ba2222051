"""Rollout Routing Replay (R3): train a mixture of experts through the experts that its rollouts used."""

from typing import TYPE_CHECKING, Any

from .gating import masked_topk_gating
from .generation import disable_routing_replay, enable_routing_replay
from .router_check import UnsupportedRouterError
from .router_replay import RouterReplay

if TYPE_CHECKING:
    from .r3_config import R3GRPOConfig
    from .r3_trainer import R3GRPOTrainer

__all__ = [
    "R3GRPOConfig",
    "R3GRPOTrainer",
    "RouterReplay",
    "UnsupportedRouterError",
    "disable_routing_replay",
    "enable_routing_replay",
    "masked_topk_gating",
]


def __getattr__(name: str) -> Any:
    # TRL takes seconds to import, and a model can be replayed without it
    if name == "R3GRPOConfig":
        from .r3_config import R3GRPOConfig

        return R3GRPOConfig
    if name == "R3GRPOTrainer":
        from .r3_trainer import R3GRPOTrainer

        return R3GRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
