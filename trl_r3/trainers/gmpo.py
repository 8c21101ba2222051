"""GMPO with Rollout Routing Replay."""

from __future__ import annotations

from dataclasses import dataclass

from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from .mixin import RoutingReplayMixin
from .shift_config import RouterShiftConfigMixin


@dataclass
class R3GMPOConfig(RouterShiftConfigMixin, GMPOConfig):
    r"""
    Configuration class for the [`R3GMPOTrainer`]: [`~trl.experimental.gmpo.GMPOConfig`] and the fields of
    [`RouterShiftConfigMixin`].
    """


class R3GMPOTrainer(RoutingReplayMixin, GMPOTrainer):
    """
    [`~trl.experimental.gmpo.GMPOTrainer`] with Rollout Routing Replay. Arguments are those of the parent.

    Args:
        args ([`R3GMPOConfig`], *optional*):
            Configuration.
    """

    _tag_names = ["trl", "gmpo", "r3"]
    _name = "GMPO with Rollout Routing Replay (R3)"
