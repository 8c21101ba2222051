"""What the alarm costs: its own processor seconds over those of a training step."""

from __future__ import annotations

import statistics
import time

from trl_r3.alarm.evidence import Alarm
from trl_r3.records.record import pack
from trl_r3.records.samples import Sample, ScoredBatch
from trl_r3.routers.router_replay import RouterReplay

from .setup import BenchSettings, Finding, large_model, random_ids, record_of


def alarm_cost(settings: BenchSettings) -> list[Finding]:
    """Choosing rows, looking at their live selection and judging it, once a rollout, over one step of that rollout."""
    model = large_model(settings).train()
    ids = random_ids(model, settings.batch, settings.length)
    with RouterReplay(model) as replay:
        records = pack(record_of(model, replay, ids), replay.layout)
        samples = [Sample(i, ids[i], 1, records[i, :-1]) for i in range(settings.batch)]
        alarm, steps, judging = Alarm(replay.layout, "error", judges=True), [], []
        for _ in range(settings.alarm_rounds):
            batch = ScoredBatch(samples, 1, replay.layout, observes=True)
            begin = time.process_time()
            batch.take(settings.batch, settings.length, ids)
            chosen = time.process_time() - begin
            assert batch.observed is not None  # every row is recorded
            live_MLK = records.flatten(0, 1)[batch.observed].long()
            begin = time.process_time()
            batch.observe(live_MLK)
            alarm.look(batch.observations)
            fault = alarm.judge()
            judging.append(chosen + time.process_time() - begin)
            assert fault is None, fault
            begin = time.process_time()
            with replay.replay(records):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            steps.append(time.process_time() - begin)
            model.zero_grad()
    share = statistics.median(judging) / statistics.median(steps)
    return [
        Finding(f"alarm over a step, {len(live_MLK)} rows", share, 0.005),
        Finding("alarm: milliseconds a rollout", statistics.median(judging) * 1e3),
    ]
