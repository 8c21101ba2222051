"""GRPO with Rollout Routing Replay."""

from __future__ import annotations

from dataclasses import dataclass

from trl import GRPOConfig, GRPOTrainer

from .mixin import RoutingReplayMixin
from .shift_config import RouterShiftConfigMixin


@dataclass
class R3GRPOConfig(RouterShiftConfigMixin, GRPOConfig):
    r"""
    Configuration class for the [`R3GRPOTrainer`]: [`~trl.GRPOConfig`] and the fields of [`RouterShiftConfigMixin`] and
    [`RoutingReplayConfigMixin`].

    Example:

    ```python
    >>> from trl_r3 import R3GRPOConfig
    >>> args = R3GRPOConfig("out", use_routing_replay=True, use_vllm=True)
    ```
    """


class R3GRPOTrainer(RoutingReplayMixin, GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] with Rollout Routing Replay (R3, https://huggingface.co/papers/2510.11370).

    With `use_routing_replay=True`, every training forward goes through the experts that the rollout went through: the
    old-policy pass, each update and each recompute of gradient checkpointing. Weights and gradients stay live. Left
    alone are the reference policy, reward models and evaluation, which route live, and everything else that TRL does.
    With `use_routing_replay=False` it is `GRPOTrainer`, number for number, but that the base of an adapter keeps
    its bits when merged weights are sent to vLLM. `use_sampling_mask_replay=True` restricts the training distribution
    to what truncated sampling left, with or without routing replay.

    Args:
        args ([`R3GRPOConfig`], *optional*):
            Configuration. If `None`, a default one without replay.
        kwargs:
            All other arguments are those of [`~trl.GRPOTrainer`].

    Example:

    ```python
    >>> from trl_r3 import R3GRPOConfig, R3GRPOTrainer
    >>> trainer = R3GRPOTrainer(
    ...     model="Qwen/Qwen3-30B-A3B",
    ...     args=R3GRPOConfig("out", use_routing_replay=True),
    ...     reward_funcs=accuracy_reward,
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "grpo", "r3"]
    _name = "GRPO with Rollout Routing Replay (R3)"
