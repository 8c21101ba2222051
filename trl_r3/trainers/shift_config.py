"""The setting of a weight by router shift, for trainers whose loss has an importance ratio a token."""

from __future__ import annotations

from dataclasses import dataclass, field

from .config import RoutingReplayConfigMixin, check_config, has_old_policy_forward


@dataclass
class RouterShiftConfigMixin(RoutingReplayConfigMixin):
    r"""
    [`RoutingReplayConfigMixin`] and one field more, for trainers whose loss has an importance ratio a token.

    Parameters:
        routing_replay_shift_weight (`bool`, *optional*, defaults to `False`):
            Whether the importance ratio of a token is scaled by how far its routers have moved since the rollout, as
            in RSPO (arXiv 2510.23027): down to 0.8, and by 1 where they have not. [`RouterShift`] has the formula.
            Only updates after the first of a rollout can differ. Needs routers whose gate [`masked_topk_gating`]
            covers.
    """

    routing_replay_shift_weight: bool = field(
        default=False,
        metadata={
            "help": "Whether the importance ratio of a token is scaled by how far its routers have moved since the "
            "rollout, as in RSPO (arXiv 2510.23027): down to 0.8, and by 1 where they have not."
        },
    )

    def check_replay(self):
        check_config(self, has_old_policy_forward=has_old_policy_forward(self))
        check_shift(self)


def check_shift(args: RouterShiftConfigMixin) -> None:
    """
    Refuse a weight by router shift where nothing tells how far routers have moved.

    Args:
        args ([`RouterShiftConfigMixin`]):
            The config.

    Raises:
        `ValueError`: Naming what it depends on, and what to set instead.
    """
    if not args.routing_replay_shift_weight:
        return
    needs = (
        ("use_routing_replay", args.use_routing_replay is True, "True"),
        ("routing_replay_mode", args.routing_replay_mode == "R3", "'R3'"),
        ("routing_replay_gating", args.routing_replay_gating != "intercept", "'auto'"),
    )
    for name, is_met, value in needs:
        if not is_met:
            raise ValueError(
                f"`routing_replay_shift_weight` compares scores of the recorded experts, but `{name}` is "
                f"{getattr(args, name)!r}. Set `{name}={value}`, or `routing_replay_shift_weight=False`."
            )
    if not has_old_policy_forward(args):
        raise ValueError(
            "`routing_replay_shift_weight` compares the routers of an update with those of the old-policy forward, "
            "which TRL skips here: all updates of a rollout fall into one optimizer step, before which no router "
            "moves. Set `num_iterations` or `steps_per_generation` higher, or `routing_replay_shift_weight=False`."
        )


def check_ratios(args: RouterShiftConfigMixin) -> None:
    """
    Refuse a weight by router shift where GRPO takes the ratios for something else than the weight of a token: its KL
    term multiplied by them is biased, and in the product of a whole sequence they would vanish.

    Args:
        args ([`RouterShiftConfigMixin`]):
            The config, which is a [`~trl.GRPOConfig`], too.

    Raises:
        `ValueError`: Naming both settings, and what to set instead.
    """
    if args.routing_replay_shift_weight and getattr(args, "loss_type", None) == "vespo":
        raise ValueError(
            "`routing_replay_shift_weight` scales the importance ratio of each token, and `loss_type='vespo'` weighs "
            "a sequence by their product: 1000 tokens of weight 0.99 would scale it by 4e-5. Set another `loss_type`, "
            "or `routing_replay_shift_weight=False`."
        )
    beta, corrects = (getattr(args, name) for name in ("beta", "use_bias_correction_kl"))
    if args.routing_replay_shift_weight and beta and corrects:
        raise ValueError(
            f"`routing_replay_shift_weight` scales the importance ratios, and with beta={beta} and "
            "`use_bias_correction_kl=True` TRL multiplies the KL term by them. Set `use_bias_correction_kl=False`, "
            "`beta=0.0`, or `routing_replay_shift_weight=False`."
        )
