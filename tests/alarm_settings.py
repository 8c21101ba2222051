"""
The alarm on settings that its thresholds were not chosen on: `python tests/alarm_settings.py` writes docs/alarm.md.

Each setting is judged on the right record of a rollout in fewer bits, and on wrong ones.

Legend: B samples, T tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

import copy
import itertools
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from model_zoo import build_tiny
from torch import Tensor

from trl_r3 import RouterReplay, RoutingLayout
from trl_r3.records.evidence import Observation, RoutingEvidence, Verdict

PAGE = Path(__file__).parents[1] / "docs" / "alarm.md"
SAMPLES, TOKENS = 8, 132
FAMILIES = {
    "mixtral": {},
    "olmoe": {},
    "deepseek_v3": {},
    "gpt_oss": {},
    "granitemoe": {},
    "glm4_moe": {},
    "qwen2_moe": {},
}
SIZES = [(4, 1), (16, 1), (16, 4), (64, 8), (128, 8), (256, 8)]  # experts, experts per token, of a Mixtral
STDS = (0.02, 0.1, 0.2)
TRAINED = ("mixtral", "olmoe", "deepseek_v3", "qwen3_moe")


def rounded(model: Any, dtype: torch.dtype) -> Any:
    """The model as an engine has it: in bfloat16, or with weights that went through eight bits."""
    engine = copy.deepcopy(model)
    if dtype == torch.bfloat16:
        return engine.to(dtype)
    for parameter in engine.parameters():
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    return engine


def routes(model: Any, ids: Tensor) -> tuple[Tensor, RoutingLayout]:
    """(B, T, L, K) ids that a model selects."""
    with RouterReplay(model, "intercept") as replay, torch.no_grad(), replay.record() as recorded:
        model(ids)
    return recorded.routed_experts.long(), replay.layout


def judge(live_BTLK: Tensor, record_BTLK: Tensor, layout: RoutingLayout) -> Verdict:
    """All rows that have two neighbours."""
    samples = torch.arange(SAMPLES)[:, None].expand(SAMPLES, TOKENS - 2).flatten()
    here, before, after = slice(1, -1), slice(0, -2), slice(2, None)
    evidence = RoutingEvidence(layout)
    evidence.add(
        Observation(
            samples,
            live_BTLK[:, here].flatten(0, 1),
            *(record_BTLK[:, rows].flatten(0, 1) for rows in (here, before, after)),
        )
    )
    verdict = evidence.verdict()
    assert verdict is not None  # there are more than 250 rows
    return verdict


def wrong_records(record: Tensor) -> dict[str, Tensor]:
    """Records of other tokens, layers and samples."""
    last_layer, last_constant = record.clone(), record.clone()
    last_layer[:, :, -1] = record.roll(1, 0)[:, :, -1]
    last_constant[:, :, -1] = record[0, 0, -1]
    exchanged = record.clone()
    exchanged[:, :, -1] = record[:, :, 0]
    return {
        "one token late": record.roll(1, 1),
        "one token early": record.roll(-1, 1),
        "layers rotated": record.roll(1, 2),
        "first layer in the last": exchanged,
        "other samples": record.roll(1, 0),
        "half of the samples": torch.cat([record[:4], record[4:].roll(1, 0)]),
        "one sample of eight": torch.cat([record[:7], record[:1]]),
        "last layer of other samples": last_layer,
        "last layer constant": last_constant,
        "constant": record[:1, :1].expand_as(record),
    }


def train(model: Any, steps: int = 200) -> Any:
    """A task that makes routing uneven: repeat what came eight tokens before, from few of the tokens."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids = (torch.rand(16, 8, generator=generator) ** 3 * 100).long().repeat(1, 4) + 1
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def settings() -> Iterator[tuple[str, Any, Tensor]]:
    """Name, model and token ids."""
    ids = torch.randint(1, 120, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(1))
    for (family, sizes), std in itertools.product(FAMILIES.items(), STDS):
        yield f"{family}, std {std}", build_tiny(family, initializer_range=std, **sizes), ids
    for experts, top_k in SIZES:
        sizes = {"num_local_experts": experts, "num_experts_per_tok": top_k, "initializer_range": 0.1}
        yield f"mixtral, {top_k} of {experts}", build_tiny("mixtral", **sizes), ids
    uneven = (torch.rand(SAMPLES, TOKENS, generator=torch.Generator().manual_seed(2)) ** 3 * 100).long() + 1
    for family in TRAINED:
        yield f"{family}, trained", train(build_tiny(family)), uneven


def rows() -> Iterator[tuple[str, Verdict, dict[str, Verdict]]]:
    """Every setting with both kinds of rollout: the verdict on the right record, and those on the wrong ones."""
    for (name, model, ids), dtype in itertools.product(settings(), (torch.bfloat16, torch.float8_e4m3fn)):
        live, layout = routes(model, ids)
        record, _ = routes(rounded(model, dtype), ids)
        wrong = {kind: judge(live, each, layout) for kind, each in wrong_records(record).items()}
        yield f"{name}, {str(dtype)[6:]}", judge(live, record, layout), wrong


def page() -> str:
    """docs/alarm.md."""
    lines, alarms, misses, judged = [], 0, [], 0
    for name, right, wrong in rows():
        missed = [kind for kind, verdict in wrong.items() if verdict.fault is None]
        alarms, misses, judged = alarms + (right.fault is not None), misses + missed, judged + len(wrong)
        worst = max(verdict.agreement for verdict in wrong.values())
        found = f"{len(wrong) - len(missed)} of {len(wrong)}" + (f" (not: {', '.join(missed)})" if missed else "")
        lines.append(f"| {name} | {right.agreement:.2f} | {right.pooled_contrast:.2f} | {worst:.2f} | {found} |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return TEXT.format(
        date=datetime.now(UTC).date(), machine=platform.machine(), versions=versions, settings=len(lines),
        alarms=alarms, misses=len(misses), judged=judged, rows=SAMPLES * (TOKENS - 2), table="\n".join(lines),
    )  # fmt: skip


TEXT = """# The alarm

Generated by `python tests/alarm_settings.py`; edit that.

A record that belongs to other tokens trains without a word: its experts are as plausible as the right ones. So, once a
rollout and at weights that have not changed since, live routing is held against the record, in the old-policy pass or
in the first update. `routing_replay_alarm` says what a misfit gets: `"error"` (`MisalignedRecordError`, before the
optimizer moves), `"warn"` or `"off"`. Judged are the records of vLLM and of a `rollout_func`; those that the package
makes itself are logged.

| statistic | definition | right | wrong |
|---|---|---|---|
| `routing_replay/agreement` | kappa: overlap of live and recorded experts beyond chance | 0.5 or more | below |
| `routing_replay/contrast` | overlap less that with the record moved by one token | above 0, pooled over layers |
below |

kappa = (o - c) / (1 - c), where o is the mean share of the K experts that live routing and record have in common, and
c the sum over experts of (share of rows that have it live) x (share that have it recorded) / K: what these very rows
would share if they were paired at random. The log has the smallest value over layers.

Each sample with 250 (row, layer) pairs is judged as well, over all its layers. With fewer than 250 rows a rollout
waits for later ones. A layer in which chance leaves less than 0.1 open, or whose neighbouring rows overlap by more
than 0.9, says nothing: in a collapsed router a right and a wrong record are the same.

## Measured

{date}, one thread of a two-core AMD EPYC ({machine}), {versions}. Small models with random weights or trained for 200
steps, a rollout in bfloat16 or with weights rounded to eight bits (float8_e4m3fn), live routing in float32; {rows}
rows each. None of these settings served to choose the thresholds. The judgement takes 6.4 ms of processor time a
rollout, 0.36 % of a step of the model of [`trl-r3 bench`](benchmarks.md).

{settings} settings: **{alarms} false alarms**; of {judged} wrong records **{misses} were missed**. The tests against
a real vLLM 0.30 (`pytest -m vllm`), whose records are all right, run with the alarm on.

| setting | kappa, right | contrast, right | highest kappa of a wrong one | wrong records found |
|---|---|---|---|---|
{table}
"""


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    PAGE.write_text(page())
