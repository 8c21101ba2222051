"""What a trace costs: its own processor seconds over those of a training step, its bytes over those of the records.

Legend: B batch, T tokens, C completion tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator

from trl_r3.records.record import pack
from trl_r3.records.samples import Sample, ScoredBatch
from trl_r3.routers.router_replay import RouterReplay
from trl_r3.trainers.session import Scoring
from trl_r3.trainers.tracer import Tracer

from .setup import BenchSettings, Finding, large_model, random_ids, record_of


def trace_cost(settings: BenchSettings) -> list[Finding]:
    """Counting experts, putting the trace together and writing it, once a rollout, over one step of that rollout."""
    model = large_model(settings).train()
    ids_BT = random_ids(model, settings.batch, settings.length)
    with RouterReplay(model) as replay, TemporaryDirectory() as folder:
        records = pack(record_of(model, replay, ids_BT), replay.layout)
        samples = [Sample(i, ids_BT[i], 1, records[i, :-1]) for i in range(settings.batch)]
        tracer, output = Tracer(_trainer(model, folder), replay), _output(ids_BT)
        steps, own = [], []
        for step in range(settings.trace_rounds):
            tracer.trainer.state.global_step = step
            steps.append(_seconds(lambda: _step(model, replay, records, ids_BT)))
            own.append(_trace_seconds(tracer, replay, samples, records, ids_BT, output))
        (path, *_) = sorted(Path(folder).iterdir())
        size = path.stat().st_size / sum(sample.record.numel() for sample in samples)
    share = statistics.median(own) / statistics.median(steps)
    return [
        Finding("trace over a step", share, 0.01),
        Finding("trace: milliseconds a rollout", statistics.median(own) * 1e3),
        Finding(f"trace over its records, {settings.num_layers} layers: bytes", size),
    ]


def _trace_seconds(
    tracer: Tracer,
    replay: RouterReplay,
    samples: list[Sample],
    records: torch.Tensor,
    ids_BT: torch.Tensor,
    output: dict[str, Any],
) -> float:
    logprobs_BC = torch.zeros(output["completion_ids"].shape)
    spent = _seconds(tracer.begin)
    scoring, batch = Scoring(samples), ScoredBatch(samples, 1, replay.layout)
    source = tracer.source(batch, scoring)
    spent += _seconds(lambda: source.take(ids_BT.shape[0], ids_BT.shape[1], ids_BT))
    live = [ids.flatten(0, 1).long() for ids in records.unbind(2)]  # (N, K) a layer, as routers say it
    assert source.observed is not None  # every row is recorded
    rows = source.observed
    spent += _seconds(lambda: source.observe(torch.stack([ids[rows] for ids in live], dim=1)))
    stats: Any = SimpleNamespace(changed_by_layer=torch.zeros(len(live)).long(), compared_tokens=len(rows))
    spent += _seconds(lambda: tracer.scored(source, stats, logprobs_BC, None))
    return spent + _seconds(lambda: tracer.rolled_out(samples, output, logprobs_BC, scoring, None))


def _step(model: Any, replay: RouterReplay, records: torch.Tensor, ids_BT: torch.Tensor) -> None:
    with replay.replay(records):
        loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    loss.backward()
    model.zero_grad()


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def _output(ids_BT: torch.Tensor) -> dict[str, Any]:
    """What TRL makes of a rollout."""
    completion_ids = ids_BT[:, 1:]
    return {
        "prompt_ids": ids_BT[:, :1],
        "completion_ids": completion_ids,
        "completion_mask": torch.ones_like(completion_ids),
    }


def _trainer(model: Any, folder: str) -> Any:
    """What a tracer asks of a trainer."""
    args = SimpleNamespace(
        routing_replay_trace_dir=folder,
        routing_replay_trace_every=1,
        routing_replay_mode="R3",
        cast_lm_head_to_fp32=False,
    )
    model.config.pad_token_id = 0
    return SimpleNamespace(
        args=args,
        model=model,
        accelerator=Accelerator(cpu=True),
        state=SimpleNamespace(global_step=0),
        temperature=1.0,
    )
