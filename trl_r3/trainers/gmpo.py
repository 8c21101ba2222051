"""GMPO with Rollout Routing Replay."""

from __future__ import annotations

from dataclasses import dataclass

from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from .config import RoutingReplayConfigMixin, check_config, has_old_policy_forward
from .mixin import RoutingReplayMixin


@dataclass
class R3GMPOConfig(RoutingReplayConfigMixin, GMPOConfig):
    r"""
    Configuration class for the [`R3GMPOTrainer`]: [`~trl.experimental.gmpo.GMPOConfig`] and the fields of
    [`RoutingReplayConfigMixin`].
    """

    def __post_init__(self):
        super().__post_init__()
        check_config(self, has_old_policy_forward=has_old_policy_forward(self))


class R3GMPOTrainer(RoutingReplayMixin, GMPOTrainer):
    """
    [`~trl.experimental.gmpo.GMPOTrainer`] with Rollout Routing Replay. Arguments are those of the parent.

    Args:
        args ([`R3GMPOConfig`], *optional*):
            Configuration.
    """

    _tag_names = ["trl", "gmpo", "r3"]
    _name = "GMPO with Rollout Routing Replay (R3)"
