"""The heat maps of changed routers and of the load, among the curves of a run while it trains.

Legend: S steps, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import TrainerCallback

from .._compat import warn
from ..records.expert_load import ExpertLoad
from .healthy_ranges import MAX_OVER_MEAN, HealthyRange, healthy_ranges
from .heat_map import busiest_experts, changed_routers
from .trace_file import find_traces, load_trace, trace_name

TAG = "routing_replay/changed_routers_by_layer"
TAG_OF_LOAD = "routing_replay/load/max_over_mean_by_layer"


class TraceCounts(NamedTuple):
    """What is kept of a trace: counts, and nothing of its rollout."""

    step: int
    layers: list[int]
    changed: np.ndarray  # (L,)
    compared_rows: int
    load: np.ndarray  # (L, E) of the record
    healthy: dict[str, HealthyRange]


class RoutingReportCallback(TrainerCallback):
    """
    Logs changed routers and the load of the busiest expert, by layer over steps, as images, to those of TensorBoard,
    W&B and trackio that `report_to` names. It reads the traces of the run, so it needs `routing_replay_trace_dir`.

    Args:
        every (`int`, *optional*, defaults to `50`):
            Log every so many steps, and after the last.

    Raises:
        `ValueError`: At the beginning of training, if the run writes no traces.

    Example:

    ```python
    >>> from trl_r3 import RoutingReportCallback
    >>> args = R3GRPOConfig("out", use_routing_replay=True, routing_replay_trace_dir="out/traces", report_to="wandb")
    >>> trainer = R3GRPOTrainer(model, args=args, callbacks=[RoutingReportCallback()], ...)
    ```
    """

    def __init__(self, every: int = 50):
        if every < 1:
            raise ValueError(f"`every` is {every}, but it counts steps, from 1 on. Pass a positive number.")
        self.every = every
        self._read: dict[Path, TraceCounts | None] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Refuse a run that writes no traces."""
        if getattr(args, "routing_replay_trace_dir", None) is None:
            raise ValueError(
                "RoutingReportCallback draws the traces of the run, but it writes none. Set "
                "`routing_replay_trace_dir`, or leave the callback out."
            )
        self._read = {}

    def on_train_end(self, args, state, control, **kwargs):
        """Forget what was read."""
        self._read = {}

    def on_step_end(self, args, state, control, **kwargs):
        """Log the images, where they are due."""
        step = state.global_step
        if state.is_world_process_zero and (step % self.every == 0 or step == state.max_steps):
            for tag, image in self._images(Path(args.routing_replay_trace_dir), step).items():
                for tracker in args.report_to:
                    if tracker in _TRACKERS:
                        _TRACKERS[tracker](args, tag, image, step)

    def _images(self, folder: Path, step: int) -> dict[str, np.ndarray]:
        """The heat maps of the traces so far, if there are any."""
        for path in find_traces(folder):
            # later ones are of the run that this one resumes, and may be written again
            if path not in self._read and path.name < trace_name(step, 0):
                self._read[path] = _summary(path)
        read = [each for each in self._read.values() if each is not None and each.step < step]
        if not read:
            return {}
        layers = read[-1].layers
        by_step: dict[int, list[TraceCounts]] = {}
        for each in read:
            if each.layers == layers and each.compared_rows:
                by_step.setdefault(each.step, []).append(each)
        if not by_step:
            return {}
        steps = sorted(by_step)
        pairs = [(by_step[at], sum(each.compared_rows for each in by_step[at])) for at in steps]
        changed_LS = np.stack([sum(each.changed for each in some) / rows for some, rows in pairs], axis=1)
        loads = [ExpertLoad(torch.from_numpy(sum(each.load for each in by_step[at]))) for at in steps]
        max_over_mean_LS = np.stack([load.max_over_mean.numpy() for load in loads], axis=1)
        shown, healthy = [at + 1 for at in steps], read[-1].healthy
        changed_edge, load_edge = (
            healthy[name].high for name in ("routing_replay/changed_router_frac", MAX_OVER_MEAN)
        )
        return {
            TAG: _pixels(changed_routers(shown, layers, changed_LS, changed_edge)),
            TAG_OF_LOAD: _pixels(busiest_experts(shown, layers, max_over_mean_LS, load_edge)),
        }


def _pixels(figure: Figure) -> np.ndarray:
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _summary(path: Path) -> TraceCounts | None:
    try:
        trace = load_trace(path, with_records=False)
    except (OSError, ValueError) as error:
        warn(f"left out of the pictures of routers: {error}")
        return None
    facts = trace.facts
    return TraceCounts(
        facts.step,
        facts.moe_layers,
        trace.changed.numpy(),
        facts.compared_rows,
        trace.load_recorded.long().numpy(),
        healthy_ranges(facts.top_k, facts.num_experts),
    )


def _to_tensorboard(args: Any, tag: str, image: np.ndarray, step: int) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(Path(args.output_dir) / "runs" / "routing_replay")) as writer:
        writer.add_image(tag, image, step, dataformats="HWC")


def _to_run_of(tracker: str, args: Any, tag: str, image: np.ndarray, step: int) -> None:
    module = import_module(tracker)
    module.log({tag: module.Image(image), "train/global_step": step})  # the run that Transformers began


_TRACKERS: dict[str, Callable[..., None]] = {
    "tensorboard": _to_tensorboard,
    **{name: partial(_to_run_of, name) for name in ("wandb", "trackio")},
}
