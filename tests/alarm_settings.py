"""
The alarm on settings that its thresholds were not chosen on: `python tests/alarm_settings.py` writes
benchmarks/alarm_settings.md.

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
from misrouted import Bench, engine_of, record_of
from model_zoo import build_tiny, tiny_config
from torch import Tensor
from transformers import CONFIG_MAPPING

from trl_r3 import RouterReplay, RoutingLayout
from trl_r3.alarm.evidence import RoutingEvidence, Verdict
from trl_r3.records.samples import Observation

PAGE = Path(__file__).parents[1] / "benchmarks" / "alarm_settings.md"
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
# not the families on which the rule for half collapsed routers was found
COLLAPSING = [("granitemoe", 32, 8), ("dots1", 128, 8), ("minimax", 16, 1), ("gpt_oss", 32, 4), ("flex_olmo", 16, 2)]
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
    first_late, last_early = record.clone(), record.clone()
    first_late[:, :, 0] = record.roll(1, 1)[:, :, 0]
    last_early[:, :, -1] = record.roll(-1, 1)[:, :, -1]
    exchanged = record.clone()
    exchanged[:, :, -1] = record[:, :, 0]
    return {
        "one token late": record.roll(1, 1),
        "one token early": record.roll(-1, 1),
        "first layer one token late": first_late,
        "last layer one token early": last_early,
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


@torch.no_grad()
def half_collapsed(family: str, experts: int, top_k: int, own: float, seed: int) -> Any:
    """A model whose tokens have more in common than of their own, so that many go to the same experts."""
    sizes = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), experts)
    sizes |= {"num_experts_per_tok": top_k, "num_key_value_heads": 4, "hidden_size": 64, "num_hidden_layers": 4}
    sizes |= {"mlp_only_layers": []} if "qwen" in family else {}
    sizes |= {"n_group": 4, "topk_group": 2, "mlp_layer_types": ["dense"] + ["sparse"] * 3} if "dots" in family else {}
    known = vars(tiny_config(family)) | dict.fromkeys(CONFIG_MAPPING[family].attribute_map)
    model = build_tiny(family, **{name: value for name, value in sizes.items() if name in known})
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=0.1)
    embeddings = model.get_input_embeddings().weight
    embeddings.mul_(own).add_(0.1 * torch.randn(embeddings.shape[1]))
    return model


def hard_records() -> dict[str, tuple[int, int]]:
    """Right records in eight bits: of how many, and how many of these are refused, by what is hard about them."""
    found = {"of half collapsed routers": (0, 0), "of samples that repeat a token or two": (0, 0)}

    def count(name: str, model: Any, ids: Tensor) -> None:
        verdict = Bench(model, ids).verdict(record_of(engine_of(model, "fp8"), ids))
        judged, refused = found[name]
        found[name] = (judged + 1, refused + (verdict.fault is not None))

    for (family, experts, top_k), own, seed in itertools.product(COLLAPSING, (0.1, 0.2, 0.3, 0.5), range(4)):
        ids = torch.randint(1, 128, (SAMPLES, 100), generator=torch.Generator().manual_seed(seed))
        count("of half collapsed routers", half_collapsed(family, experts, top_k, own, seed), ids)
    for (experts, top_k), repeated, seed in itertools.product(((4, 1), (8, 1), (8, 2), (32, 2)), (1, 2), range(4)):
        sizes = {"num_local_experts": experts, "num_experts_per_tok": top_k, "num_hidden_layers": 2}
        model = build_tiny("mixtral", seed=seed, initializer_range=0.1, **sizes)
        ids = torch.randint(1, 128, (SAMPLES, repeated), generator=torch.Generator().manual_seed(seed))
        count("of samples that repeat a token or two", model, ids.repeat(1, 200 // repeated))
    return found


def page() -> str:
    """benchmarks/alarm_settings.md."""
    lines, alarms, misses, judged = [], 0, [], 0
    for name, right, wrong in rows():
        missed = [kind for kind, verdict in wrong.items() if verdict.fault is None]
        alarms, misses, judged = alarms + (right.fault is not None), misses + missed, judged + len(wrong)
        worst = max(verdict.agreement for verdict in wrong.values())
        found = f"{len(wrong) - len(missed)} of {len(wrong)}" + (f" (not: {', '.join(missed)})" if missed else "")
        lines.append(f"| {name} | {right.agreement:.2f} | {right.pooled_contrast:.2f} | {worst:.2f} | {found} |")
    hard = hard_records()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return TEXT.format(
        date=datetime.now(UTC).date(),
        machine=platform.machine(),
        versions=versions,
        settings=len(lines),
        hard=", ".join(f"{count} {name}" for name, (count, _) in hard.items()),
        hard_alarms=sum(refused for _, refused in hard.values()),
        alarms=alarms,
        misses=len(misses),
        judged=judged,
        rows=SAMPLES * (TOKENS - 2),
        table="\n".join(lines),
    )


TEXT = """# The alarm: its rules, and what it was tried on

<!-- Generated by `python tests/alarm_settings.py`; edit that. -->

[What it is for](../docs/watching.md#the-alarm). Once a rollout, live routing is compared with the record, by two
statistics:

| statistic | definition | right | wrong |
|---|---|---|---|
| `routing_replay/agreement` | kappa: overlap of live and recorded experts beyond chance | 0.5 or more | below |
| `routing_replay/contrast` | overlap less that with the record moved by one token | above 0 over all layers | below |

kappa = (o - c) / (1 - c), where o is the mean share of the K experts that live routing and record have in common, and
c the sum over experts of (share of rows that have it live) x (share that have it recorded) / K: what these very rows
would share if they were paired at random. The log has the smallest value over layers.

Each sample with 250 (row, layer) pairs is judged as well, over all its layers, and for being moved. With fewer than
250 rows a process waits for later rollouts, and updates go on meanwhile. A fault misses its bound by two standard
errors at least, for which equal rows count once: a sample that repeats one token is one observation.

Collapsed routers are judged with more care:

* A router that sends all tokens to the same experts cannot tell a right record from a wrong one. A layer in which two
  tokens share more than 0.9 of their live experts is not judged.
* In a half collapsed router the rounding of a rollout moves the edge of the top-k for all tokens at once, so kappa
  falls to 0 with a right record. So a layer has to fail in one more way: its overlap o is below 0.5, or below the
  middle between chance c and the most that is possible, given how often each expert is selected on either side.
* A record that holds one row for all tokens is called wrong only where two tokens differ in 0.25 of their experts.

## Measured

{date}, one thread of a two-core Intel Xeon ({machine}), {versions}. Small models with random weights or trained for
200 steps, a rollout in bfloat16 or with weights rounded to eight bits (float8_e4m3fn), live routing in float32; {rows}
rows each. None of these settings served to choose the thresholds. On a two-core AMD EPYC the judgement
took 6.9 ms of processor time a rollout, 0.40 % of a step of the model of [`python -m benchmarks`](measured.md).

{settings} settings: **{alarms} false alarms**; of {judged} wrong records **{misses} were missed**. The tests against
a real vLLM 0.30 (`pytest -m vllm`), whose records are all right, run with the alarm on.

Right records that are hard to tell: {hard}.
Of these, **{hard_alarms} were refused**.

| setting | kappa, right | contrast, right | highest kappa of a wrong one | wrong records found |
|---|---|---|---|---|
{table}
"""


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    PAGE.write_text(page())
