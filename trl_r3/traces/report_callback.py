"""The heat map of changed routers, among the curves of a run while it trains.

Legend: S steps, L MoE layers.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import TrainerCallback

from .heat_map import changed_routers
from .trace_file import find_traces, load_trace

TAG = "routing_replay/changed_routers_by_layer"


class ChangedRouters(NamedTuple):
    """What is kept of a trace: counts, and nothing of its rollout."""

    step: int
    layers: list[int]
    changed: np.ndarray  # (L,)
    compared_rows: int


class RoutingReportCallback(TrainerCallback):
    """
    Logs changed routers by layer over steps as an image, to those of TensorBoard, W&B and trackio that `report_to`
    names. It reads the traces of the run, so `routing_replay_trace_dir` has to be set.

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
        self._read: dict[Path, ChangedRouters | None] = {}

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
        """Log the image, where it is due."""
        step = state.global_step
        if state.is_world_process_zero and (step % self.every == 0 or step == state.max_steps):
            image = self._image(Path(args.routing_replay_trace_dir), step)
            if image is not None:
                for tracker in args.report_to:
                    if tracker in _TRACKERS:
                        _TRACKERS[tracker](args, image, step)

    def _image(self, folder: Path, step: int) -> np.ndarray | None:
        """The heat map of the traces so far, if there are any."""
        for path in find_traces(folder):
            if path not in self._read:
                self._read[path] = _summary(path)
        read = [each for each in self._read.values() if each is not None and each.step < step]
        if not read:
            return None
        layers = read[-1].layers
        counts: dict[int, np.ndarray] = {}  # by step: changed by layer, and rows
        for each in read:
            if each.layers == layers:
                one = np.append(each.changed, each.compared_rows).astype(float)
                counts[each.step] = counts.get(each.step, 0.0) + one
        steps = sorted(at for at, each in counts.items() if each[-1])
        if not steps:
            return None
        changed_LS = np.stack([counts[at][:-1] / counts[at][-1] for at in steps], axis=1)
        figure = changed_routers([at + 1 for at in steps], layers, changed_LS)
        canvas: Any = figure.canvas
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _summary(path: Path) -> ChangedRouters | None:
    try:
        trace = load_trace(path, with_records=False)
    except (OSError, ValueError) as error:
        warnings.warn(f"left out of the picture of changed routers: {error}", RuntimeWarning, stacklevel=2)
        return None
    return ChangedRouters(trace.facts.step, trace.facts.moe_layers, trace.changed.numpy(), trace.facts.compared_rows)


def _to_tensorboard(args: Any, image: np.ndarray, step: int) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(Path(args.output_dir) / "runs" / "routing_replay")) as writer:
        writer.add_image(TAG, image, step, dataformats="HWC")


def _to_wandb(args: Any, image: np.ndarray, step: int) -> None:
    import wandb

    wandb.log({TAG: wandb.Image(image), "train/global_step": step})  # the run that Transformers began


def _to_trackio(args: Any, image: np.ndarray, step: int) -> None:
    import trackio

    trackio.log({TAG: trackio.Image(image), "train/global_step": step})


_TRACKERS = {"tensorboard": _to_tensorboard, "wandb": _to_wandb, "trackio": _to_trackio}
