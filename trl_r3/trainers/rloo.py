"""RLOO with Rollout Routing Replay."""

from __future__ import annotations

from dataclasses import dataclass

from trl import RLOOConfig, RLOOTrainer

from .config import RoutingReplayConfigMixin, check_config
from .mixin import RoutingReplayMixin


@dataclass
class R3RLOOConfig(RoutingReplayConfigMixin, RLOOConfig):
    r"""
    Configuration class for the [`R3RLOOTrainer`]: [`~trl.RLOOConfig`] and the fields of [`RoutingReplayConfigMixin`].
    """

    def check_replay(self):
        check_config(self, has_old_policy_forward=True)


class R3RLOOTrainer(RoutingReplayMixin, RLOOTrainer):
    """
    [`~trl.RLOOTrainer`] with Rollout Routing Replay. Arguments are those of the parent. With vLLM it logs no
    `sampling/*`, because this trainer drops the log-probabilities of the engine.

    Args:
        args ([`R3RLOOConfig`], *optional*):
            Configuration.
    """

    _tag_names = ["trl", "rloo", "r3"]
    _name = "RLOO with Rollout Routing Replay (R3)"
