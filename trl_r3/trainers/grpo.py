"""GRPO with Rollout Routing Replay."""

from __future__ import annotations

from dataclasses import dataclass

from trl import GRPOConfig, GRPOTrainer

from .mixin import RoutingReplayMixin
from .shift_config import RouterShiftConfigMixin, check_ratios


@dataclass
class R3GRPOConfig(RouterShiftConfigMixin, GRPOConfig):
    r"""
    Configuration class for the [`R3GRPOTrainer`]: [`~trl.GRPOConfig`] and the fields of [`RouterShiftConfigMixin`].

    Parameters:
        use_routing_replay (`bool`, *optional*, defaults to `False`):
            Whether every training forward goes through the experts that the rollout went through.
        routing_replay_mode (`str`, *optional*, defaults to `"R3"`):
            `"R3"`: recorded by the rollout; `"R2"`: recorded by the old-policy forward.
        routing_replay_max_missing (`float`, *optional*, defaults to `0.0`):
            Share of rows that matter to the loss and may lack a record.
        routing_replay_compare_every (`int`, *optional*, defaults to `0`):
            Every so many steps, score the batch once more with live routing.
        routing_replay_load_every (`int`, *optional*, defaults to `0`):
            Every so many steps, log how the experts are loaded and how records age.
        routing_replay_gating (`str`, *optional*, defaults to `"auto"`):
            `"intercept"`, `"op"`, or the op where its compiled kernels are installed and cover the gate.
        routing_replay_padding (`str`, *optional*, defaults to `"auto"`):
            `"auto"`: layers see real tokens only, where the model allows and nobody watches. `"keep"`: as TRL does.
        routing_replay_alarm (`str`, *optional*, defaults to `"error"`):
            What a record that does not fit its tokens gets: `"error"`, `"warn"` or `"off"`.
        routing_replay_trace_dir (`str`, *optional*):
            Folder to write rollouts and their records to.
        routing_replay_trace_every (`int`, *optional*, defaults to `1`):
            Write one every so many steps.
        routing_replay_shift_weight (`bool`, *optional*, defaults to `False`):
            Whether the importance ratio of a token shrinks as its routers move away from the rollout (RSPO). With a
            `beta`, set `use_bias_correction_kl=False`; not with `loss_type="vespo"`.
        use_sampling_mask_replay (`bool`, *optional*, defaults to `False`):
            Whether the training distribution is restricted to the tokens that truncated sampling left in the rollout.
        routing_replay_spill_dir (`str`, *optional*):
            Folder for records while they are trained on, instead of host memory.

    Example:

    ```python
    >>> from trl_r3 import R3GRPOConfig
    >>> args = R3GRPOConfig("out", use_routing_replay=True, use_vllm=True)
    ```
    """

    def check_replay(self):
        super().check_replay()
        check_ratios(self)


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
