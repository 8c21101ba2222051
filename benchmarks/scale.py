"""`python -m benchmarks scale`: whether what a record costs a token is the same for short and for long sequences.

Legend: T tokens of a sequence, L MoE layers, K experts per token.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from trl_r3.engines.payloads import decode_vllm_http
from trl_r3.engines.turns import Turn, stitch
from trl_r3.records.record import RoutingLayout, to_record
from trl_r3.records.samples import Sample, ScoredBatch

from .records import payload
from .setup import Finding, in_turn

QWEN3_30B = RoutingLayout(tuple(range(48)), 48, num_experts=128, top_k=8)
MAX_SPREAD = 1.1  # the largest of the lengths over the smallest


@dataclass(frozen=True)
class ScaleSettings:
    """
    Sizes of the benchmark.

    Args:
        lengths (`tuple[int, ...]`):
            Tokens of a sequence.
        tokens (`int`):
            Of all sequences of a measurement, so that each length moves the same number of bytes.
        repeats (`int`):
            Measurements of each length, which take turns.
    """

    lengths: tuple[int, ...] = (1024, 4096, 8192, 16384, 32768)
    tokens: int = 65536
    repeats: int = 50


SMOKE = ScaleSettings(lengths=(32, 64), tokens=256, repeats=2)


def run(output: Path | None, settings: ScaleSettings | None = None) -> list[Finding]:
    """
    Measure each stage at each length, and print a table.

    Args:
        output (`Path`, *optional*):
            JSON file.
        settings ([`ScaleSettings`], *optional*):
            Sizes.

    Returns:
        list of [`Finding`].
    """
    from .overhead import environment, table, threads_of

    settings = settings or ScaleSettings()
    with threads_of():
        findings = scale(settings)
    console = Console()
    console.print(table(findings))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        log = {**environment(), "threads": 1, "settings": asdict(settings)}
        log["findings"] = [{**asdict(finding), "met": finding.met} for finding in findings]
        output.write_text(json.dumps(log, indent=1) + "\n")
        console.print(f"Written to {output.resolve()}", soft_wrap=True)
    return findings


def scale(settings: ScaleSettings) -> list[Finding]:
    """Nanoseconds and bytes a token of each stage and length, and how far the lengths are apart."""
    stages = {length: _stages(length, settings.tokens // length) for length in settings.lengths}

    def compared(name: str) -> list[Finding]:
        findings: list[Finding] = []
        works = {length: of_length[name] for length, of_length in stages.items()}
        times = _nanoseconds(works, settings)
        sizes = {length: _bytes(work) / _tokens(length, settings) for length, work in works.items()}
        for what, values in (("ns", times), ("bytes", sizes)):
            findings += [
                Finding(f"{name}: {what} a token, {length} tokens", value) for length, value in values.items()
            ]
            spread = max(values.values()) / min(values.values())
            findings.append(Finding(f"{name}: {what} a token, largest over smallest", spread, MAX_SPREAD))
        return findings

    return in_turn({name: partial(compared, name) for name in ("records", "alignment", "transfer")})


def _tokens(length: int, settings: ScaleSettings) -> int:
    return settings.tokens // length * length


def _stages(length: int, samples: int) -> dict[str, Callable[[], Tensor | list[Tensor]]]:
    """What is measured: a server's answers to records, records to a padded batch, that batch to its device."""
    rng = np.random.default_rng(0)
    layout, answer = QWEN3_30B, payload(rng, length - 1, QWEN3_30B)
    sequences = rng.integers(0, 1000, (samples, length))
    prompts = sequences[:, : length // 2].tolist()
    completions = sequences[:, length // 2 :].tolist()
    tokens = torch.from_numpy(sequences)

    def records() -> list[Tensor]:
        rows = [to_record(decode_vllm_http(answer), layout, sample) for sample in range(samples)]
        return list(stitch([Turn(prompts, completions, rows)], prompts, completions, layout).records)

    kept = [Sample(i, tokens[i], length // 2, record) for i, record in enumerate(records())]

    def alignment() -> Tensor:
        return ScoredBatch(kept, length // 2, layout).take(samples, length, tokens)

    batch = alignment()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def transfer() -> Tensor:
        moved = batch.to(device, copy=True)
        if moved.is_cuda:
            torch.cuda.synchronize()
        return moved

    return {"records": records, "alignment": alignment, "transfer": transfer}


def _nanoseconds(works: dict[int, Callable[[], Tensor | list[Tensor]]], settings: ScaleSettings) -> dict[int, float]:
    """
    Of each length, a token: the fastest of rounds in which the lengths take turns.

    Processor time, so that other work on the machine counts little; on a GPU the wall, where the processor only waits.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds: dict[int, list[float]] = {length: [] for length in works}
    gc.disable()
    try:
        for repeat in range(settings.repeats + 1):
            for length, work in works.items():
                begin = clock()
                work()
                if repeat:  # the first round warms up
                    seconds[length].append(clock() - begin)
    finally:
        gc.enable()
    return {length: min(taken) / _tokens(length, settings) * 1e9 for length, taken in seconds.items()}


def _bytes(work: Callable[[], Tensor | list[Tensor]]) -> int:
    """Host memory that its result holds on to, with whatever it is a view of."""
    result = work()
    made = result if isinstance(result, list) else [result]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in made}
    return sum(storages.values())
