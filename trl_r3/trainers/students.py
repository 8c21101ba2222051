"""Settings of trainers that distil: what replay has for a student, and what it has not."""

from __future__ import annotations

from typing import Any

from .config import check_config

_NOT_FOR_STUDENTS = {  # and what leaves each out
    "routing_replay_compare_every": 0,
    "routing_replay_trace_dir": None,
    "use_sampling_mask_replay": False,
}


def check_student_config(args: Any, *, has_old_policy_forward: bool | None = None) -> None:
    """
    Refuse values that cannot work for a student.

    Args:
        args ([`RoutingReplayConfigMixin`]):
            The config.
        has_old_policy_forward (`bool`, *optional*):
            Whether the trainer scores a rollout before it updates on it; `None` where it never does.

    Raises:
        `ValueError`: Naming the field, its value and what to set instead.
    """
    check_config(args, has_old_policy_forward=has_old_policy_forward is not False)
    for name, off in _NOT_FOR_STUDENTS.items():
        if getattr(args, name) != off:
            raise ValueError(
                f"`{name}` is {getattr(args, name)!r}, but it needs log-probabilities of the sampled tokens, and a "
                f"distillation compares whole distributions. Set `{name}={off!r}`, or train with R3GRPOTrainer."
            )
    if args.use_routing_replay and args.routing_replay_mode == "R2" and has_old_policy_forward is None:
        raise ValueError(
            "`routing_replay_mode='R2'` replays what the old-policy forward recorded, and this trainer has none. Set "
            "`routing_replay_mode='R3'`."
        )
