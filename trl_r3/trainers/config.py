"""The switch and its companions."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

from transformers import TrainingArguments

from ..routers.padding import PADDINGS
from ..routers.router_replay import GATINGS

MODES = ("R3", "R2")
ALARMS = ("error", "warn", "off")

_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {  # what a field may be, and how that is called
    bool: ((bool,), "True or False"),
    int: ((Integral,), "a whole number"),
    float: ((Real,), "a number"),
    str | None: ((str, NoneType), "a folder or None"),
}


@dataclass
class RoutingReplayConfigMixin:
    r"""
    Fields that routing replay adds to the config of a trainer.

    Parameters:
        use_routing_replay (`bool`, *optional*, defaults to `False`):
            Whether every training forward goes through the experts that the rollout went through. Turns on their
            capture in whatever rollout engine is configured, and fails at construction where that cannot work. With
            `False` the trainer is the one of TRL, number for number.
        routing_replay_mode (`str`, *optional*, defaults to `"R3"`):
            What is replayed: `"R3"` the selection recorded by the rollout (arXiv 2510.11370), `"R2"` the one recorded
            by the old-policy forward (arXiv 2507.18071, section 5.3).
        routing_replay_max_missing (`float`, *optional*, defaults to `0.0`):
            Share of rows that matter to the loss and may lack a record. Above it a step raises; below it they route
            live and are counted in `routing_replay/missing_frac`.
        routing_replay_compare_every (`int`, *optional*, defaults to `0`):
            Every so many steps, score the batch once more with live routing, which logs `sampling/live/*` beside
            `sampling/*`. `0` never does.
        routing_replay_load_every (`int`, *optional*, defaults to `0`):
            Every so many steps, log how the experts of the rollout are loaded, by layer, and how live routing agrees
            with its records as they age: `routing_replay/load/*`. `0` never does.
        routing_replay_gating (`str`, *optional*, defaults to `"auto"`):
            How a recorded selection takes effect: `"intercept"` leaves everything but the selection to the model's own
            code, bit for bit; `"op"` computes the gate with [`masked_topk_gating`], equal up to rounding; `"auto"`
            takes the op where its compiled kernels are installed and cover the gate.
        routing_replay_padding (`str`, *optional*, defaults to `"auto"`):
            What replay makes of padding: `"auto"` gives layers, or at least their experts, real tokens only, if a
            forward and a backward of the model were found equal to padded ones. Losses and gradients are equal up to
            rounding. While a forward hook watches the decoder, passes stay padded. `"keep"` lets padding go
            through every layer, as TRL does, bit for bit.
        routing_replay_alarm (`str`, *optional*, defaults to `"error"`):
            What a record that does not fit its tokens gets, before the optimizer moves: `"error"`, `"warn"` or
            `"off"`. Records of vLLM and of a `rollout_func` are judged; those that this package makes itself are only
            logged.
        routing_replay_trace_dir (`str`, *optional*):
            Folder to write rollouts to, each with its records, log-probabilities and what the forward depended on:
            one file a process and step, for [`load_trace`], `trl-r3 verify --trace` and `trl-r3 report`.
        routing_replay_trace_every (`int`, *optional*, defaults to `1`):
            Write one every so many steps.
        use_sampling_mask_replay (`bool`, *optional*, defaults to `False`):
            Whether the training distribution is restricted to the tokens that top-p, top-k and min-p left in the
            rollout: old-policy pass, updates, reference pass and entropies. With or without routing replay, on dense
            models, too.
        routing_replay_spill_dir (`str`, *optional*):
            Folder for the records of a rollout while it is trained on: memory-mapped safetensors files instead of host
            memory, removed when the next rollout begins. Each process makes a folder of its own in it, so a disk of
            the host will do. By default records stay in memory.
    """

    use_routing_replay: bool = field(
        default=False,
        metadata={
            "help": "Whether every training forward goes through the experts that the rollout went through. Turns on "
            "their capture in whatever rollout engine is configured, and fails at construction where that cannot "
            "work. With False the trainer is the one of TRL, number for number."
        },
    )
    routing_replay_mode: str = field(
        default="R3",
        metadata={
            "help": "What is replayed: 'R3' the selection recorded by the rollout, 'R2' the one recorded by the "
            "old-policy forward.",
            "choices": list(MODES),
        },
    )
    routing_replay_max_missing: float = field(
        default=0.0,
        metadata={
            "help": "Share of rows that matter to the loss and may lack a record. Above it a step raises; below it "
            "they route live and are counted in routing_replay/missing_frac."
        },
    )
    routing_replay_compare_every: int = field(
        default=0,
        metadata={
            "help": "Every so many steps, score the batch once more with live routing, which logs sampling/live/* "
            "beside sampling/*. 0 never does."
        },
    )
    routing_replay_load_every: int = field(
        default=0,
        metadata={
            "help": "Every so many steps, log how the experts of the rollout are loaded, by layer, and how live "
            "routing agrees with its records as they age: routing_replay/load/*. 0 never does."
        },
    )
    routing_replay_gating: str = field(
        default="auto",
        metadata={
            "help": "How a recorded selection takes effect: 'intercept' leaves everything but the selection to the "
            "model's own code, bit for bit; 'op' computes the gate with masked_topk_gating, equal up to rounding; "
            "'auto' takes the op where its compiled kernels are installed and cover the gate.",
            "choices": list(GATINGS),
        },
    )
    routing_replay_padding: str = field(
        default="auto",
        metadata={
            "help": "What replay makes of padding: 'auto' gives layers, or at least their experts, real tokens only, "
            "if a forward and a backward of the model were found equal to padded ones. Losses and gradients are equal "
            "up to rounding. While a forward hook watches the decoder, passes stay padded. 'keep' lets padding "
            "go through every layer, as TRL does, bit for bit.",
            "choices": list(PADDINGS),
        },
    )
    routing_replay_alarm: str = field(
        default="error",
        metadata={
            "help": "What a record that does not fit its tokens gets, before the optimizer moves: 'error', 'warn' or "
            "'off'. Records of vLLM and of a rollout_func are judged; those that this package makes itself are only "
            "logged.",
            "choices": list(ALARMS),
        },
    )
    routing_replay_trace_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder to write rollouts to, each with its records, log-probabilities and what the forward "
            "depended on: one file a process and step, for load_trace, trl-r3 verify --trace and trl-r3 report."
        },
    )
    routing_replay_trace_every: int = field(default=1, metadata={"help": "Write a trace every so many steps."})
    use_sampling_mask_replay: bool = field(
        default=False,
        metadata={
            "help": "Whether the training distribution is restricted to the tokens that top-p, top-k and min-p left "
            "in the rollout: old-policy pass, updates, reference pass and entropies. With or without routing replay, "
            "on dense models, too."
        },
    )
    routing_replay_spill_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the records of a rollout while it is trained on: memory-mapped safetensors files "
            "instead of host memory, removed when the next rollout begins. By default records stay in memory."
        },
    )

    def __post_init__(self):
        super().__post_init__()  # type: ignore[misc]
        self.check_replay()

    def check_replay(self) -> None:
        """Refuse values that cannot work; where a trainer is built, too, as fields can be set after this was made."""
        check_types(self)


def check_config(args: Any, *, has_old_policy_forward: bool) -> None:
    """
    Refuse values that cannot work, of the fields above and of what they depend on.

    Args:
        args ([`~trl.GRPOConfig`]):
            A config with the fields of [`RoutingReplayConfigMixin`].
        has_old_policy_forward (`bool`):
            Whether the trainer scores a rollout before it updates on it.

    Raises:
        `ValueError`: Naming the field, its value and what to set instead.
    """
    check_types(args)
    for name, does in (("routing_replay_compare_every", "compare"), ("routing_replay_load_every", "log the load")):
        if getattr(args, name) < 0:
            raise ValueError(
                f"`{name}` is {getattr(args, name)}, but it counts steps. Set `{name}=0` to never {does}."
            )
    _check_folders(args)
    if args.use_routing_replay and args.routing_replay_mode == "R2" and not has_old_policy_forward:
        raise ValueError(
            "`routing_replay_mode='R2'` replays what the old-policy forward recorded, but TRL skips that forward "
            f"with `gradient_accumulation_steps={args.gradient_accumulation_steps}`, "
            f"`steps_per_generation={args.steps_per_generation}` and `num_iterations={args.num_iterations}`: all "
            "updates of a batch fall into one optimizer step. Set `num_iterations` or `steps_per_generation` higher "
            "so that one rollout serves several optimizer steps, or `routing_replay_mode='R3'`."
        )


def check_types(args: Any) -> None:
    """
    Refuse values of another type, for settings of files and sweeps come as None or as text, and `"false"` would be
    true, and a share that is none.

    `off` without quotes is a boolean in YAML, so `routing_replay_alarm` takes it. Paths become text.

    Args:
        args ([`RoutingReplayConfigMixin`]):
            The config.

    Raises:
        `ValueError`: Naming the field, its value and what to set instead.
    """
    if args.routing_replay_alarm is False:
        args.routing_replay_alarm = "off"
    mixins = (each for each in type(args).__mro__ if issubclass(each, RoutingReplayConfigMixin))
    ours = next(each for each in mixins if not issubclass(each, TrainingArguments))  # with those that it builds on
    hints = get_type_hints(ours)
    for each in fields(ours):
        value, kind = getattr(args, each.name), hints[each.name]
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
            setattr(args, each.name, value)
        if "choices" in each.metadata:
            is_right, expected = value in each.metadata["choices"], f"one of {tuple(each.metadata['choices'])}"
        else:
            accepted, expected = _KINDS[kind]
            is_right = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
        if not is_right:
            raise ValueError(
                f"`{each.name}` is {value!r}, expected {expected}. Set it so, or leave it out for the default, "
                f"{each.default!r}."
            )
    if not 0.0 <= args.routing_replay_max_missing <= 1.0:
        raise ValueError(
            f"`routing_replay_max_missing` is {args.routing_replay_max_missing}, but it is a share between 0 and 1. "
            "Set `routing_replay_max_missing=0.0` to allow no missing row."
        )


def _check_folders(args: Any) -> None:
    if args.routing_replay_trace_every < 1:
        raise ValueError(
            f"`routing_replay_trace_every` is {args.routing_replay_trace_every}, but it counts steps, from 1 on. Set "
            "`routing_replay_trace_dir=None` to write no traces."
        )
    if args.routing_replay_trace_dir is not None and not args.use_routing_replay:
        raise ValueError(
            f"`routing_replay_trace_dir` is {args.routing_replay_trace_dir!r}, but without replay there are no "
            "records to write. Set `use_routing_replay=True`, or `routing_replay_trace_dir=None`."
        )
    spill_dir = args.routing_replay_spill_dir
    if spill_dir is not None and not (spill_dir and _can_be_written(Path(spill_dir))):
        raise ValueError(
            f"`routing_replay_spill_dir` is {spill_dir!r}, which is no folder that can be written to. Set "
            "`routing_replay_spill_dir` to one with room for the records, or to `None` to keep them in memory."
        )


def _can_be_written(folder: Path) -> bool:
    """Whether a folder, or the nearest path above it that is there, is a folder to write to."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def has_old_policy_forward(args: Any) -> bool:
    """Whether GRPO scores a rollout before it updates on it, by the rule of `_generate_and_score_completions`."""
    if args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) != 0:
        return True
    return bool(args.use_vllm and args.vllm_importance_sampling_correction)
