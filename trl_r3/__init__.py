"""Rollout Routing Replay (R3): train a mixture of experts through the experts that its rollouts used."""

from .discovery import UnsupportedRouterError
from .generation import disable_routing_replay, enable_routing_replay
from .r3_config import R3GRPOConfig
from .r3_trainer import R3GRPOTrainer
from .router_replay import RouterReplay

__all__ = [
    "R3GRPOConfig",
    "R3GRPOTrainer",
    "RouterReplay",
    "UnsupportedRouterError",
    "disable_routing_replay",
    "enable_routing_replay",
]
