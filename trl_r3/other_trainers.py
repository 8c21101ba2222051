"""The same delta for TRL's other trainers that roll out and score as GRPO does."""

from __future__ import annotations

from dataclasses import dataclass

from trl import RLOOConfig, RLOOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from .r3_config import RoutingReplayConfigMixin, check_config, has_old_policy_forward
from .r3_trainer import RoutingReplayMixin


@dataclass
class R3GMPOConfig(RoutingReplayConfigMixin, GMPOConfig):
    r"""
    Configuration class for the [`R3GMPOTrainer`]: [`~trl.experimental.gmpo.GMPOConfig`] and the fields of
    [`RoutingReplayConfigMixin`].
    """

    def __post_init__(self):
        super().__post_init__()
        check_config(self, has_old_policy_forward=has_old_policy_forward(self))


@dataclass
class R3RLOOConfig(RoutingReplayConfigMixin, RLOOConfig):
    r"""
    Configuration class for the [`R3RLOOTrainer`]: [`~trl.RLOOConfig`] and the fields of [`RoutingReplayConfigMixin`].
    """

    def __post_init__(self):
        super().__post_init__()
        check_config(self, has_old_policy_forward=True)


class R3GMPOTrainer(RoutingReplayMixin, GMPOTrainer):
    """
    [`~trl.experimental.gmpo.GMPOTrainer`] with Rollout Routing Replay. Arguments are those of the parent.

    Args:
        args ([`R3GMPOConfig`], *optional*):
            Configuration.
    """

    _tag_names = ["trl", "gmpo", "r3"]


class R3RLOOTrainer(RoutingReplayMixin, RLOOTrainer):
    """
    [`~trl.RLOOTrainer`] with Rollout Routing Replay. Arguments are those of the parent. With vLLM it logs no
    `sampling/*`, because this trainer drops the log-probabilities of the engine.

    Args:
        args ([`R3RLOOConfig`], *optional*):
            Configuration.
    """

    _tag_names = ["trl", "rloo", "r3"]
