"""`python -m benchmarks vllm`: what the capture of routes costs the installed vLLM, in an environment of its own.

Two engines of one process take turns, one that returns routes and one that does not, on prompts that none has seen.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from trl_r3.engines.vllm_versions import vllm_engine_kwargs

from .setup import SMOKE as SMALL
from .setup import BenchSettings, Finding, in_turn, large_model

LEAST_THROUGHPUT = 0.97  # with routes over without
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's seconds are those of this process
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class CaptureSettings:
    """
    Sizes of the benchmark.

    Args:
        prompt_lengths (`tuple[int, ...]`), new_tokens, prompts (`int`):
            Of a measurement: `prompts` requests at once.
        pairs (`int`):
            Measurements with and without, which take turns.
        model ([`BenchSettings`]):
            Sizes of the model.
    """

    prompt_lengths: tuple[int, ...] = (64, 512)
    new_tokens: int = 64
    prompts: int = 4
    pairs: int = 4
    model: BenchSettings = BenchSettings()


SMOKE = CaptureSettings(
    prompt_lengths=(8, 40), new_tokens=4, prompts=2, pairs=1, model=replace(SMALL, hidden_size=128)
)


def run(output: Path | None, settings: CaptureSettings | None = None) -> list[Finding]:
    """
    Measure both engines, and print a table.

    Args:
        output (`Path`, *optional*):
            JSON file.
        settings ([`CaptureSettings`], *optional*):
            Sizes.

    Returns:
        list of [`Finding`].
    """
    from .overhead import environment, table

    settings = settings or CaptureSettings()
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)  # it has read the environment; threads that wait for one another spin, and are counted
    if version("vllm") >= "0.31":
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        large_model(settings.model).save_pretrained(folder)
        engines = {routes: start(folder, routes, settings) for routes in (False, True)}
        findings = capture(engines, settings)
    console = Console()
    console.print(f"vLLM {version('vllm')}")
    console.print(table(findings))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        log = {**environment(), "vllm": version("vllm"), "threads": 1, "settings": asdict(settings)}
        log["findings"] = [{**asdict(finding), "met": finding.met} for finding in findings]
        output.write_text(json.dumps(log, indent=1) + "\n")
    return findings


def start(folder: str, routes: bool, settings: CaptureSettings) -> Any:
    """An engine in this process, with prefix caching as routes want it."""
    from vllm import LLM

    longest = max(settings.prompt_lengths) + settings.new_tokens
    sizes = {"max_model_len": longest, "max_num_batched_tokens": 2 * longest, "max_num_seqs": settings.prompts}
    arguments: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, **sizes}
    # vLLM trusts the length that the config tells
    arguments["hf_overrides"] = {"max_position_embeddings": longest}
    return LLM(folder, enable_prefix_caching=True, **arguments, **_capture(routes))


def _capture(routes: bool) -> dict[str, bool]:
    kwargs = vllm_engine_kwargs(version("vllm"))
    kwargs.pop("enable_prefix_caching", None)
    return kwargs if routes else {}


def capture(engines: dict[bool, Any], settings: CaptureSettings) -> list[Finding]:
    """Processor seconds of both engines at each length of a prompt."""
    seeds = count()

    def of_length(length: int) -> list[Finding]:
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for pair in range(settings.pairs + 1):
            for routes in (False, True) if pair % 2 else (True, False):  # neither always follows the other
                spent = measure(engines[routes], length, next(seeds), settings)
                if pair:  # the first pair warms up
                    seconds[routes].append(spent)
        return list(_compared(length, seconds))

    return in_turn({f"prompts of {length}": partial(of_length, length) for length in settings.prompt_lengths})


def measure(llm: Any, length: int, seed: int, settings: CaptureSettings) -> float:
    """Processor seconds of one call of the engine."""
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, 1000, (settings.prompts, length), generator=generator).tolist()
    sampling = SamplingParams(max_tokens=settings.new_tokens, ignore_eos=True, detokenize=False, logprobs=0)
    begin = time.process_time()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    spent = time.process_time() - begin
    assert all(len(output.outputs[0].token_ids) == settings.new_tokens for output in outputs)
    assert all(output.num_cached_tokens == 0 for output in outputs)
    return spent


def _compared(length: int, seconds: dict[bool, list[float]]) -> Iterator[Finding]:
    without, with_routes = (statistics.median(seconds[routes]) for routes in (False, True))
    what = f"prompts of {length}"
    yield Finding(f"{what}: seconds with routes over without", with_routes / without, 1 / LEAST_THROUGHPUT)
    yield Finding(f"{what}: throughput with routes over without", without / with_routes)
    yield Finding(f"{what}: seconds without", without)
    yield Finding(f"{what}: seconds with routes", with_routes)
