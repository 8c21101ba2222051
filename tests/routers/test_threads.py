"""Threads: one records or replays, and what another feeds meanwhile gets no experts of its tokens."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracles import foreign_record, stacked

from trl_r3 import RouterReplay
from trl_r3.cli.experts import executed_ids


@pytest.mark.parametrize("records", [False, True])
def test_another_thread_is_refused(qwen, ids, records):
    """It forwards other tokens of the same size while the first is in its forward."""
    replay = RouterReplay(qwen)
    record, refused = foreign_record(replay, *ids.shape), []

    def forward_other():
        try:
            with torch.no_grad():
                qwen(ids.flip(1))
        except RuntimeError as error:
            refused.append(str(error))

    def meanwhile(*call):
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=forward_other)
            other.start()
            other.join()

    qwen.model.layers[1].register_forward_pre_hook(meanwhile)
    with executed_ids(qwen) as seen, torch.no_grad(), replay.record() if records else replay.replay(record) as told:
        qwen(ids)
    assert len(refused) == 1 and "inside a `record()` or `replay()` that has one of thread" in refused[0]
    assert len(told.forwards) == 1 if records else torch.equal(stacked(seen, 2), record)
    meanwhile_live = qwen(ids.flip(1)).logits
    assert torch.isfinite(meanwhile_live).all(), "outside of it any thread may"


def test_a_thread_that_does_it_all(qwen, ids):
    """As Transformers' continuous batching does; the next context may be of another one."""
    replay = RouterReplay(qwen)
    record = foreign_record(replay, *ids.shape)
    with executed_ids(qwen) as seen, ThreadPoolExecutor(1) as pool, replay.replay(record):
        loss = pool.submit(lambda: qwen(ids, labels=ids).loss).result()
    assert torch.equal(stacked(seen, 2), record)
    loss.backward()
    with replay.replay(record):
        qwen(ids, labels=ids).loss.backward()
