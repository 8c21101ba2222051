"""What a run left behind: its traces, step by step, and its log.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...records.expert_load import ExpertLoad
from ...records.metrics import SHARES
from ...traces.healthy_ranges import MAX_OVER_MEAN, HealthyRange, healthy_ranges
from ...traces.trace import Trace, TraceFacts
from ...traces.trace_file import find_traces, load_trace
from ...traces.trace_summary import StepSummary, summarise

LOGGED_LAYER = re.compile(r"routing_replay/load/layer_(\d+)/max_over_mean")
TAUS = (1.1, 1.5, 2.0)
MAX_NAMED = 3  # unreadable files
K3, LIVE_K3, EXTREME = "sampling/k3_kl", "sampling/live/k3_kl", "sampling/extreme_token_frac"
MISSING_ROWS = "routing_replay/missing_frac"
# what TRL logs of training, and what the report calls it
TRAINING = {"reward": "reward", "entropy": "entropy", "clip_ratio/region_mean": "clip ratio", "loss": "loss"}

Curve = dict[int, float]  # by step


@dataclass
class RunData:
    """
    What there is to draw.

    Args:
        folder (`Path`):
            Where it was found.
        facts ([`TraceFacts`], *optional*):
            Of the first trace.
        steps (list of [`StepSummary`]):
            Of the traces, ascending.
        log (dict of `str` to dict of `int` to `float`):
            By metric and step.
        training (dict of `str` to dict of `int` to `float`):
            What TRL logged, likewise.
        diverged (dict of `str` to dict of `int` to `float`):
            What of both is NaN or infinite, which no curve has.
        load (dict of `int` to dict of `int` to `float`):
            What was logged of the busiest expert, by decoder layer and step.
        lacking (list of `str`):
            What is not there, and what to do about it.
    """

    folder: Path
    facts: TraceFacts | None = None
    steps: list[StepSummary] = field(default_factory=list)
    log: dict[str, Curve] = field(default_factory=dict)
    training: dict[str, Curve] = field(default_factory=dict)
    diverged: dict[str, Curve] = field(default_factory=dict)
    load: dict[int, Curve] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.resolve().name

    @property
    def replays(self) -> bool:
        """Whether anything of replay was logged or traced: masks of sampling alone log a mismatch, too."""
        return bool(self.steps) or any(name.startswith("routing_replay/") for name in self.log)

    @property
    def healthy(self) -> dict[str, HealthyRange]:
        """Ranges for its experts, which traces tell."""
        return healthy_ranges(self.facts.top_k, self.facts.num_experts) if self.facts else healthy_ranges()

    def curve(self, name: str) -> Curve:
        """A metric over steps: from the log, and where that lacks it, from the traces."""
        if name == MAX_OVER_MEAN and (by_step := self.max_over_mean()[1]):  # of the worst layer
            return {step: max(by_step[step]) for step in sorted(by_step)}
        if name == EXTREME:
            return self.extreme("replayed", TAUS[-1])
        traced = {_logged_at(step): value for step in self.steps if (value := _of_step(step, name)) is not None}
        return dict(sorted({**traced, **self.log.get(name, {})}.items()))

    def max_over_mean(self) -> tuple[list[int], dict[int, list[float]]]:
        """MoE layers, and by step the load of the busiest expert of each: from the log, and from the traces."""
        layers = self.facts.moe_layers if self.facts is not None else sorted(self.load)
        traced = {_logged_at(step): ExpertLoad(step.load_recorded).max_over_mean.tolist() for step in self.steps}
        curves = [self.load.get(layer, {}) for layer in layers]
        logged = set.intersection(*map(set, curves)) if curves else set()
        return layers, {**traced, **{at: [curve[at] for curve in curves] for at in logged}}

    def extreme(self, way: str, tau: float) -> Curve:
        """F(tau) over steps of `"replayed"` or `"live"` routing."""
        name = {"replayed": EXTREME, "live": "sampling/live/extreme_token_frac"}[way]
        sums = {_logged_at(step): getattr(step, way) for step in self.steps}
        traced = {at: each.extreme[tau] / each.tokens for at, each in sums.items() if each.tokens}
        return dict(sorted({**traced, **(self.log.get(name, {}) if tau == 2.0 else {})}.items()))


def _logged_at(step: StepSummary) -> int:
    return step.step + 1  # TRL logs an update under the number of updates taken


def _of_step(step: StepSummary, name: str) -> float | None:
    pairs = step.compared_rows * len(step.changed)
    parts = {
        "routing_replay/changed_router_frac": (float(step.changed.sum()), pairs),
        "routing_replay/missing_frac": (step.missing, step.rows),
        "routing_replay/replayed_frac": (step.rows - step.missing, step.rows),
        "routing_replay/agreement": (sum(step.agreements), len(step.agreements)),
        "routing_replay/contrast": (sum(step.contrasts), len(step.contrasts)),
        "sampling/k3_kl": (step.replayed.k3, step.replayed.tokens),
        "sampling/live/k3_kl": (step.live.k3, step.live.tokens),
    }
    part, whole = parts.get(name, (0, 0))
    return part / whole if whole else None


def gather(folder: Path) -> RunData:
    """
    Read the traces and the log of a run.

    Args:
        folder (`Path`):
            The `output_dir` of a run, or a folder with traces.

    Returns:
        [`RunData`].

    Raises:
        `ValueError`: If there is neither, or none that can be read; one sentence with the fact and the remedy.
    """
    data = RunData(folder)
    paths = [path for each in (folder, *sorted(filter(Path.is_dir, folder.iterdir()))) for path in find_traces(each)]
    if paths:
        _read_traces(data, paths)
    _read_log(data)
    if data.replays:
        _name_what_is_lacking(data)
    elif not data.training:
        raise without_replay(folder)
    return data


def without_replay(folder: Path) -> ValueError:
    """The error for a folder in which there is nothing to judge."""
    return ValueError(
        f"{folder} holds neither traces (step-*.safetensors) nor a log of a run with replay "
        "(trainer_state.json). Pass the `output_dir` of a run with `use_routing_replay=True`, or its "
        "`routing_replay_trace_dir`."
    )


def _read_traces(data: RunData, paths: list[Path]) -> None:
    unreadable: list[str] = []

    def traces() -> Iterator[Trace]:
        for path in paths:
            try:
                yield load_trace(path, with_records=False)
            except ValueError as error:
                unreadable.append(str(error))

    readable = list(traces())
    if not readable:
        raise ValueError(unreadable[0])
    data.facts, data.steps = summarise(readable, TAUS)
    if no_numbers := {_logged_at(step): math.nan for step in data.steps if step.replayed.diverged}:
        data.diverged[K3] = no_numbers
    data.lacking += unreadable[:MAX_NAMED]
    if len(unreadable) > MAX_NAMED:
        data.lacking.append(f"{len(unreadable) - MAX_NAMED} more traces could not be read either.")
    _name_missing_processes(data)


def _name_missing_processes(data: RunData) -> None:
    """Traces of other hosts that were not copied here, or of an earlier run with more processes."""
    partial = [step for step in data.steps if len(step.ranks) < max(step.num_ranks)]
    mixed = [step for step in data.steps if len(step.num_ranks) > 1]
    if mixed:
        counts = " and of ".join(map(str, sorted(mixed[0].num_ranks)))
        data.lacking.append(
            f"Traces of more than one run are added up at {len(mixed)} steps: step {mixed[0].step} has those of runs "
            f"of {counts} processes. Remove those of the earlier run."
        )
    elif partial:
        first = partial[0]
        data.lacking.append(
            f"Traces of some processes lack at {len(partial)} steps: step {first.step} has those of "
            f"{len(first.ranks)} of {max(first.num_ranks)}. Copy those of the other hosts into one folder."
        )


def _read_log(data: RunData) -> None:
    states = sorted(data.folder.glob("checkpoint-*/trainer_state.json"), key=_checkpoint_step)
    own = data.folder / "trainer_state.json"
    path = own if own.is_file() else states[-1] if states else None
    if path == own and states:  # of the end of a run, which may have been resumed since
        last = max((step for step, _ in _entries(own)), default=0)
        written = own.stat().st_mtime
        resumed = [each for each in states if _checkpoint_step(each) > last and each.stat().st_mtime > written]
        path = resumed[-1] if resumed else own
    if path is None:
        data.lacking.append(
            "There is no log (trainer_state.json), so curves have the traced steps only. Pass the `output_dir` of the "
            "run, after a checkpoint or `trainer.save_state()`."
        )
        return
    entries = _entries(path)
    for curves, names in ((data.log, (*SHARES, MAX_OVER_MEAN)), (data.training, TRAINING)):
        for name in names:
            logged = {step: float(entry[name]) for step, entry in entries if _is_number(entry.get(name))}
            if values := {step: value for step, value in logged.items() if math.isfinite(value)}:
                curves[name] = values
            if no_numbers := {step: value for step, value in logged.items() if not math.isfinite(value)}:
                data.diverged[name] = {**data.diverged.get(name, {}), **no_numbers}
    for step, entry in entries:
        for name, value in entry.items():
            layer = LOGGED_LAYER.fullmatch(name)
            if layer and _is_number(value) and math.isfinite(value):
                data.load.setdefault(int(layer[1]), {})[step] = float(value)
    if not data.replays:
        data.lacking.append(f"{path} has no metric of routing replay: that run was without `use_routing_replay`.")


def _entries(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The log of a trainer: each entry and its step."""
    try:
        history = json.loads(path.read_text())["log_history"]
        return [(int(entry["step"]), entry) for entry in history]
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is no log of a trainer ({error!r}). Pass the `output_dir` of a run.") from error


def _checkpoint_step(path: Path) -> int:
    number = re.fullmatch(r"checkpoint-(\d+)", path.parent.name)
    return int(number[1]) if number else -1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _name_what_is_lacking(data: RunData) -> None:
    if not data.steps:
        data.lacking.append(
            "There are no traces, so nothing is drawn by layer, by expert or by token. Train with "
            "`routing_replay_trace_dir` set to a folder inside this one."
        )
    logged = data.training.keys() | data.diverged.keys()
    if data.training and (unlogged := [label for name, label in TRAINING.items() if name not in logged]):
        data.lacking.append(f"The log has no {' and no '.join(unlogged)}.")
    if not data.curve(K3) and K3 not in data.diverged:
        data.lacking.append(
            "There are no log-probabilities of the rollout, so its mismatch with training is not drawn: the engine "
            "gave none, or samples from a truncated distribution (`top_p`, `top_k`, `min_p`)."
        )
    elif not data.curve(LIVE_K3):
        data.lacking.append(
            "Live routing was not compared, so by how much replay cuts k3 is not known. Set "
            "`routing_replay_compare_every`."
        )
    if not data.curve("routing_replay/agreement"):
        data.lacking.append(
            "Agreement and contrast were not computed: no pass at the weights of a rollout looked at live routing."
        )
