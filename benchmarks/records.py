"""From an engine's answer to a record: the real decoder, checks and alignment on synthetic payloads of full size.

Legend: R rows of a sample, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

import base64
import io
import statistics
import time
import tracemalloc

import numpy as np

from trl_r3.engines.payloads import decode_vllm_http
from trl_r3.engines.turns import RolloutRecord, Turn, stitch
from trl_r3.records.record import RoutingLayout, to_record

from .setup import BenchSettings, Finding

_DISTINCT = 4  # payloads that are made; the others repeat them


def record_making(settings: BenchSettings) -> list[Finding]:
    """Speed and memory of taking a rollout's routes out of HTTP answers, at the sizes of Qwen3-30B-A3B."""
    layout = RoutingLayout(tuple(range(48)), 48, num_experts=128, top_k=8)
    samples, tokens = settings.rollout_samples, settings.rollout_tokens
    rng = np.random.default_rng(0)
    made = [payload(rng, tokens - 1, layout) for _ in range(_DISTINCT)]
    payloads = [made[i % _DISTINCT] for i in range(samples)]
    sequences = rng.integers(0, 1000, (samples, tokens)).tolist()
    prompts = [ids[: tokens // 2] for ids in sequences]
    completions = [ids[tokens // 2 :] for ids in sequences]

    def records() -> RolloutRecord:
        arrays = [decode_vllm_http(payload) for payload in payloads]
        turn = Turn(prompts, completions, [to_record(ids, layout, i) for i, ids in enumerate(arrays)])
        return stitch([turn], prompts, completions, layout)

    size = sum(record.numel() * record.element_size() for record in records().records)
    seconds = []
    for _ in range(settings.pairs):
        begin = time.process_time()
        records()
        seconds.append(time.process_time() - begin)
    tracemalloc.start()
    try:
        records()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    median = statistics.median(seconds)
    return [
        Finding(f"records of {samples} x {tokens} tokens, 48 layers, 8 experts: seconds", median),
        Finding("records: MB a second and core", size / median / 1e6),
        Finding("records: seconds a GB", median / size * 1e9, 2.0),
        Finding("records: peak host memory over their size", peak / size, 1.2),
    ]


def payload(rng: np.random.Generator, rows: int, layout: RoutingLayout) -> str:
    """What a vLLM server answers for one sample: random ids, (R, L, K), as base64 of a file of NumPy."""
    scores = rng.random((rows * len(layout.moe_layers), layout.num_experts), dtype=np.float32)
    ids = scores.argpartition(-layout.top_k, axis=1)[:, -layout.top_k :].astype(np.uint8)
    with io.BytesIO() as file:
        np.save(file, ids.reshape(rows, len(layout.moe_layers), layout.top_k))
        return base64.b64encode(file.getvalue()).decode()
