"""Traces: now and then a rollout goes to disk, with its records and what its training forward said.

Each process writes its own file and waits for no other. What cannot be written ends tracing, not the run.

Legend: B batch, C completion tokens, T tokens with padding, L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._compat import drops_out, warn
from ..alarm.evidence import Verdict
from ..records.metrics import ReplayStats
from ..records.samples import Sample, ScoredBatch
from ..records.sampling_mask import SamplingMask
from ..routers.router_replay import RouterReplay
from ..traces.counted_batch import CountedBatch
from ..traces.trace import ATTENDED, COUNTED, Trace, TraceFacts
from ..traces.trace_conditions import autocast_dtype, conditions, gating_mode, padding_mode
from ..traces.trace_file import find_traces, save_trace, trace_name
from ._compat_trainers import beside_tokens
from .log import counted_tokens, raise_together

if TYPE_CHECKING:
    from .attaching import ReplayingTrainer
    from .session import Scoring

_NOISE = {  # by the attribute of a module that says how much: what leaves it out
    "neftune_noise_alpha": "neftune_noise_alpha=None",
    "jitter_noise": "router_jitter_noise=0.0",
    "input_jitter_noise": "input_jitter_noise=0.0",
}


@dataclass
class Pending:
    """A trace whose rollout has been scored in part, or not at all."""

    step: int
    load_live: Tensor  # (L, E)
    load_recorded: Tensor  # (L, E)
    changed: Tensor  # (L,)
    compared_rows: int = 0
    samples: list[Sample] = field(default_factory=list)  # as scored
    train: list[Tensor] = field(default_factory=list)  # (C_i,), likewise
    forwards: list[tuple[int, int, int]] = field(default_factory=list)
    statistics: list[tuple[float | None, float | None]] = field(default_factory=list)
    first: int = 0  # the lowest identity of the rollout
    of_rollout: dict[str, list[Tensor]] | None = None  # by identity: what its batch said
    unreplayable: str | None = None

    def add(self, samples: list[Sample], logprobs: Tensor) -> None:
        """Take the log-probabilities (B, C) of some samples."""
        self.samples += samples
        self.train += _completions(logprobs, samples)

    @property
    def is_whole(self) -> bool:
        """Whether every sample of the rollout has been scored."""
        return self.of_rollout is not None and len(self.samples) == len(self.of_rollout["masks"])


class Tracer:
    """
    Writes rollouts of a trainer to disk.

    Args:
        trainer ([`ReplayingTrainer`]):
            With `routing_replay_trace_dir` in its arguments.
        replay ([`RouterReplay`]):
            The handle on its policy.

    Raises:
        `OSError`: On every process, if the folder cannot be made on one.
    """

    def __init__(self, trainer: ReplayingTrainer, replay: RouterReplay):
        self.trainer, self.replay = trainer, replay
        self.every: int = trainer.args.routing_replay_trace_every
        self.directory: Path | None = Path(trainer.args.routing_replay_trace_dir)
        self._last: int | None = None  # step of the last trace
        self._pending: Pending | None = None
        self._conditions: dict[str, Any] | None = None  # which stay as they are
        raise_together(trainer.accelerator, _made(self.directory))

    def begin(self) -> None:
        """Before a rollout."""
        step = self.trainer.state.global_step
        due = self.directory is not None and (self._last is None or step - self._last >= self.every)
        self._pending = None
        if self.directory is not None and self._last is None and self.trainer.accelerator.is_main_process:
            _warn_of_later(self.directory, step)
        if due:
            layout, self._last = self.replay.layout, step
            shape = (len(layout.moe_layers), layout.num_experts)
            live, recorded = (torch.zeros(shape, dtype=torch.int64, device="cpu") for _ in range(2))
            self._pending = Pending(step, live, recorded, live.new_zeros(shape[0]))

    def source(self, batch: ScoredBatch, scoring: Scoring) -> ScoredBatch | CountedBatch:
        """What a pass over a batch takes its records from: with a count where it is to be traced."""
        pending = self._pending
        wanted = pending is not None and (
            not scoring.is_update or (not scoring.has_old_policy and pending.step == self.trainer.state.global_step)
        )
        return CountedBatch(batch) if wanted else batch

    def scored(
        self, source: ScoredBatch | CountedBatch, stats: ReplayStats, logprobs: Tensor, verdict: Verdict | None
    ) -> None:
        """After a pass at the weights of the rollout: the first that scores a sample is the one that is kept."""
        pending = self._pending
        if pending is None or not isinstance(source, CountedBatch):
            return
        batch = source.batch
        pending.add(list(batch.samples), logprobs)
        pending.forwards += [(size, batch.prompt_width, width) for size, width in source.sizes]
        pending.load_live += source.live_LE
        pending.load_recorded += source.recorded_LE
        pending.changed += torch.as_tensor(stats.changed_by_layer, device="cpu")
        pending.compared_rows += int(stats.compared_tokens)
        if verdict is not None:
            pending.statistics.append((_finite(verdict.agreement), _finite(verdict.contrast)))
        self._write_if_whole()

    def rolled_out(
        self,
        samples: list[Sample],
        output: dict[str, Any],
        rollout_logprobs: Tensor | None,
        scoring: Scoring,
        live_logprobs: Tensor | None,
    ) -> None:
        """After a rollout and the passes over it: what TRL made of it, and (B, C) log-probabilities."""
        pending = self._pending
        if pending is None or not samples:
            return
        masks_BC = output["completion_mask"] * ATTENDED + counted_tokens(output) * COUNTED
        given = {"masks": masks_BC.to(torch.uint8), "rollout": rollout_logprobs, "live": live_logprobs}
        pending.first = samples[0].identity
        pending.of_rollout = {name: _completions(value, samples) for name, value in given.items() if value is not None}
        pending.unreplayable = _why_unreplayable(self.trainer.accelerator.unwrap_model(self.trainer.model), output)
        if scoring.old_logprobs is not None and not pending.samples:
            self._take_own_record(pending, samples, output, scoring.old_logprobs)
        self._write_if_whole()

    def _take_own_record(
        self, pending: Pending, samples: list[Sample], output: dict[str, Any], logprobs: Tensor
    ) -> None:
        """Of the old-policy pass of R2, whose record is its own selection."""
        pending.add(samples, logprobs)
        size, layout = self.trainer.args.per_device_train_batch_size, self.replay.layout
        prompt_width = output["prompt_ids"].size(1)
        width = prompt_width + output["completion_ids"].size(1)
        pending.forwards = [
            (min(size, len(samples) - first), prompt_width, width) for first in range(0, len(samples), size)
        ]
        for sample in samples:
            rows, missing = sample.count_rows(layout)
            pending.load_recorded += sample.expert_load(layout)
            pending.compared_rows += rows - missing
        pending.load_live += pending.load_recorded

    def _write_if_whole(self) -> None:
        pending, directory = self._pending, self.directory
        if pending is None or directory is None or not pending.is_whole:
            return
        self._pending = None
        try:
            save_trace(self._trace(pending), directory)
        except OSError as error:
            self.directory = None
            warn(
                f"tracing ends at step {pending.step}, the run goes on: {error}. Make room in {directory}, or set "
                "`routing_replay_trace_every` higher."
            )

    def _trace(self, pending: Pending) -> Trace:
        samples, of_rollout = pending.samples, pending.of_rollout
        assert of_rollout is not None  # it is whole
        order = [sample.identity - pending.first for sample in samples]
        flat = {name: torch.cat([values[i] for i in order]) for name, values in of_rollout.items()}
        lengths = [(sample.prompt_length, sample.completion_length) for sample in samples]
        masks = [sample.mask for sample in samples if sample.mask is not None]
        kept = SamplingMask.join(masks) if masks else None
        return Trace(
            facts=self._facts(pending),
            lengths=torch.tensor(lengths, dtype=torch.int32, device="cpu"),
            forwards=torch.tensor(pending.forwards, dtype=torch.int32, device="cpu"),
            tokens=torch.cat([sample.tokens for sample in samples]).int(),
            masks=flat["masks"],
            train_logprobs=torch.cat(pending.train),
            rollout_logprobs=flat.get("rollout"),
            live_logprobs=flat.get("live"),
            load_live=pending.load_live.int(),
            load_recorded=pending.load_recorded.int(),
            changed=pending.changed.int(),
            records=torch.cat([sample.record for sample in samples]),
            kept_ids=None if kept is None else kept.ids,
            kept_counts=None if kept is None else kept.counts.int(),
        )

    def _facts(self, pending: Pending) -> TraceFacts:
        trainer, accelerator, layout = self.trainer, self.trainer.accelerator, self.replay.layout
        model = accelerator.unwrap_model(trainer.model)
        if self._conditions is None:
            self._conditions = conditions(model)
        counts = [sample.count_rows(layout) for sample in pending.samples]
        agreement, contrast = (_mean(column) for column in zip(*(pending.statistics or [(None, None)]), strict=True))
        return TraceFacts(
            step=pending.step,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
            mode=trainer.args.routing_replay_mode,
            moe_layers=list(layout.moe_layers),
            num_decoder_layers=layout.num_decoder_layers,
            num_experts=layout.num_experts,
            top_k=layout.top_k,
            pad_token_id=model.config.get_text_config().pad_token_id,
            temperature=float(trainer.temperature),
            float32_head=bool(getattr(trainer.args, "cast_lm_head_to_fp32", False)),
            gating=gating_mode(self.replay),
            # the old-policy pass of R2 records, and pads
            padding="none" if trainer.args.routing_replay_mode == "R2" else padding_mode(self.replay),
            autocast=autocast_dtype(accelerator.autocast(), accelerator.device.type),
            rows=sum(rows for rows, _ in counts),
            missing=sum(missing for _, missing in counts),
            compared_rows=pending.compared_rows,
            agreement=agreement,
            contrast=contrast,
            unreplayable=pending.unreplayable,
            **self._conditions,
        )


def _completions(padded_BC: Tensor, samples: list[Sample]) -> list[Tensor]:
    """(C_i,) of each sample, on the host, in memory of their own."""
    padded_BC = padded_BC.detach().cpu()
    lengths = [sample.completion_length for sample in samples]
    return [row[:length].clone() for row, length in zip(padded_BC, lengths, strict=True)]


def _why_unreplayable(model: Any, output: dict[str, Any]) -> str | None:
    """What else the forwards of a batch depend on, and what to do about it."""
    if beside := beside_tokens(output):
        return f"its forwards were given {', '.join(beside)}, which no trace holds. Trace a run on text."
    for name, each in model.named_modules():
        if drops_out(each) and each.training and each.p > 0:
            return f"its forwards dropped values out at random, in {name}. Set `disable_dropout=True` to trace."
        noise = next((noise for noise in _NOISE if each.training and (getattr(each, noise, None) or 0) > 0), None)
        if noise is not None:
            return f"its forwards added noise at random, in {name}. Set `{_NOISE[noise]}` to trace."
    if model.training and getattr(model.config.get_text_config(), "attention_dropout", 0) > 0:
        return "its attention dropped values out at random. Load the model with `attention_dropout=0.0` to trace."
    return None


def _warn_of_later(directory: Path, step: int) -> None:
    later = [path for path in find_traces(directory) if path.name >= trace_name(step + 1, 0)]
    if later:
        warn(
            f"{directory} holds {len(later)} traces of steps after {step}, which are of an earlier run: until this "
            "one writes over them, `trl-r3 report` draws them beside its own. Remove them, or set "
            "`routing_replay_trace_dir` to another folder."
        )


def _made(directory: Path) -> OSError | None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return OSError(
            f"`routing_replay_trace_dir` cannot be used: {error}. Set it to a folder that can be written to."
        )
    return None


def _finite(value: float) -> float | None:
    return value if value == value else None


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
