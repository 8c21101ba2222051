"""Traces: now and then a rollout goes to disk, with its records and what its training forward said.

Each process writes its own file and waits for no other. What cannot be written ends tracing, not the run.

Legend: B batch, C completion tokens, T tokens with padding, L MoE layers, E experts.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..records.expert_load import CountedBatch, expert_load
from ..records.samples import Sample, ScoredBatch
from ..records.storage import missing_rows
from ..records.trace import ATTENDED, COUNTED, Trace, TraceFacts
from ..records.trace_file import save_trace
from ..routers.forward_pass import ReplayStats
from .rollout import Scoring
from .together import raise_together
from .trace_conditions import autocast_of, conditions, gating_of

_NOT_TRACED = ("pixel_values", "image_grid_thw", "token_type_ids", "mm_token_type_ids")  # of a batch with images


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
        trainer ([`RoutingReplayMixin`]):
            Attached. Without `routing_replay_trace_dir` in its arguments, nothing is done.

    Raises:
        `OSError`: On every process, if the folder cannot be made on one.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        args = trainer.args
        self.every: int = args.routing_replay_trace_every
        self.directory = None if args.routing_replay_trace_dir is None else Path(args.routing_replay_trace_dir)
        self._last: int | None = None  # step of the last trace
        self._pending: Pending | None = None
        self._conditions: dict[str, Any] | None = None  # which stay as they are
        if self.directory is not None:
            raise_together(trainer.accelerator, _made(self.directory))

    def begin(self) -> None:
        """Before a rollout."""
        step = self.trainer.state.global_step
        due = self.directory is not None and (self._last is None or step - self._last >= self.every)
        self._pending = None
        if due:
            layout, self._last = self.trainer.routing_replay.layout, step
            shape = (len(layout.moe_layers), layout.num_experts)
            live, recorded = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
            self.trainer._alarm.seen = None
            self._pending = Pending(step, live, recorded, torch.zeros(shape[0], dtype=torch.int64))

    def source(self, batch: ScoredBatch, scoring: Scoring) -> ScoredBatch | CountedBatch:
        """What a pass over a batch takes its records from: with a count where it is to be traced."""
        pending = self._pending
        wanted = pending is not None and (
            scoring.inputs is None or (not scoring.has_old_policy and pending.step == self.trainer.state.global_step)
        )
        return CountedBatch(batch) if wanted else batch

    def scored(self, source: ScoredBatch | CountedBatch, stats: ReplayStats, logprobs: Tensor) -> None:
        """After a pass at the weights of the rollout: the first that scores a sample is the one that is kept."""
        pending = self._pending
        if pending is None or not isinstance(source, CountedBatch):
            return
        batch = source.batch
        pending.add(list(batch.samples), logprobs)
        pending.forwards += [(size, batch.prompt_width, width) for size, width in source.sizes]
        pending.load_live += source.live_LE
        pending.load_recorded += source.recorded_LE
        pending.changed += torch.as_tensor(stats.changed_by_layer).cpu()
        pending.compared_rows += int(stats.compared_tokens)
        self._take_statistics(pending)
        self._write_if_whole()

    def rolled_out(
        self,
        samples: list[Sample],
        output: dict[str, Any],
        old_logprobs: Tensor | None,
        live_logprobs: Tensor | None,
    ) -> None:
        """After a rollout and the passes over it."""
        pending = self._pending
        if pending is None or not samples:
            return
        counted_BC = output["completion_mask"] * output.get("tool_mask", 1)
        masks_BC = output["completion_mask"] * ATTENDED + counted_BC * COUNTED
        rollout_logprobs = self.trainer._rollout_logprobs(output)
        given = {"masks": masks_BC.to(torch.uint8), "rollout": rollout_logprobs, "live": live_logprobs}
        pending.first = samples[0].identity
        pending.of_rollout = {name: _completions(value, samples) for name, value in given.items() if value is not None}
        beside = [name for name in _NOT_TRACED if name in output]
        if beside:
            pending.unreplayable = (
                f"its forwards were given {', '.join(beside)}, which no trace holds. Trace a run on text."
            )
        elif self.trainer._use_masks:
            pending.unreplayable = (
                "its log-probabilities are over the tokens that sampling kept, which no trace holds. Trace a run with "
                "`use_sampling_mask_replay=False`."
            )
        self._take_statistics(pending)
        if old_logprobs is not None and not pending.samples:
            self._take_own_record(pending, samples, output, old_logprobs)
        self._write_if_whole()

    def _take_statistics(self, pending: Pending) -> None:
        alarm = self.trainer._alarm
        seen, alarm.seen = alarm.seen, None
        if seen is not None:
            pending.statistics.append((_finite(seen.agreement), _finite(seen.contrast)))

    def _take_own_record(
        self, pending: Pending, samples: list[Sample], output: dict[str, Any], logprobs: Tensor
    ) -> None:
        """Of the old-policy pass of R2, whose record is its own selection."""
        pending.add(samples, logprobs)
        size, layout = self.trainer.args.per_device_train_batch_size, self.trainer.routing_replay.layout
        prompt_width = output["prompt_ids"].size(1)
        width = prompt_width + output["completion_ids"].size(1)
        pending.forwards = [
            (min(size, len(samples) - first), prompt_width, width) for first in range(0, len(samples), size)
        ]
        for sample in samples:
            rows = sample.record[~missing_rows(sample.record, layout)]
            pending.load_recorded += expert_load(rows, layout.num_experts)
            pending.compared_rows += len(rows)
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
            warnings.warn(
                f"tracing ends at step {pending.step}, the run goes on: {error}. Make room in {directory}, or set "
                "`routing_replay_trace_every` higher.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _trace(self, pending: Pending) -> Trace:
        samples, of_rollout = pending.samples, pending.of_rollout
        assert of_rollout is not None  # it is whole
        order = [sample.identity - pending.first for sample in samples]
        flat = {name: torch.cat([values[i] for i in order]) for name, values in of_rollout.items()}
        lengths = [(sample.prompt_length, len(sample.tokens) - sample.prompt_length) for sample in samples]
        return Trace(
            facts=self._facts(pending),
            lengths=torch.tensor(lengths, dtype=torch.int32),
            forwards=torch.tensor(pending.forwards, dtype=torch.int32),
            tokens=torch.cat([sample.tokens for sample in samples]).int(),
            masks=flat["masks"],
            train_logprobs=torch.cat(pending.train),
            rollout_logprobs=flat.get("rollout"),
            live_logprobs=flat.get("live"),
            load_live=pending.load_live.int(),
            load_recorded=pending.load_recorded.int(),
            changed=pending.changed.int(),
            records=torch.cat([sample.record for sample in samples]),
        )

    def _facts(self, pending: Pending) -> TraceFacts:
        trainer, accelerator = self.trainer, self.trainer.accelerator
        layout = trainer.routing_replay.layout
        model = accelerator.unwrap_model(trainer.model)
        if self._conditions is None:
            self._conditions = conditions(model)
        counts = [sample.missing(layout) for sample in pending.samples]
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
            gating=gating_of(trainer.routing_replay),
            autocast=autocast_of(accelerator.autocast(), accelerator.device.type),
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
    lengths = [len(sample.tokens) - sample.prompt_length for sample in samples]
    return [row[:length].clone() for row, length in zip(padded_BC, lengths, strict=True)]


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
