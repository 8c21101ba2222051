"""What was looked at, what was seen, and for what does not hold its likely cause and what to do.

Legend: L MoE layers, K experts per token, C completion tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...alarm.evidence import Verdict
from ...alarm.judge import Fault
from ...engines.vllm_versions import VLLM_FLAG
from ...records.metrics import extreme_token_frac, k3_kl
from ...routers.router_replay import RouterReplay
from .executed import Executed
from .rows import CheckedRows
from .sampling import VerifiedRollout
from .training import Gradients

Status = Literal["right", "wrong", "not judged"]

# Replayed rollouts in lower precision measured up to 2e-4, live ones 4e-3; wrong weights or scores give far more.
MAX_K3 = 1e-2
# Of the largest element of a gradient. The kinds of checkpointing run the same kernels: in practice they are equal.
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
_COARSE = 5e-2


@dataclass
class Finding:
    """
    One row of the table.

    Args:
        what (`str`):
            What was looked at.
        status (`str`):
            `"right"`, `"wrong"` or `"not judged"`.
        seen (`str`):
            The fact, with its numbers.
        cause (`str`, *optional*):
            Of what is wrong, as far as it shows.
        remedy (`str`, *optional*):
            What to do.
    """

    what: str
    status: Status
    seen: str
    cause: str | None = None
    remedy: str | None = None


def rows_finding(rows: CheckedRows, rollout: VerifiedRollout) -> Finding:
    """Whether every row is there and can have been selected by a router."""
    seen = f"{rows.expected} expected: {rows.present} present, {rows.missing} missing, {rows.invalid} invalid"
    if rows.lowest_invalid_layer is not None:
        seen += f", the lowest in layer {rows.lowest_invalid_layer}"
    if rows.present == rows.expected:
        return Finding("rows", "right", seen)
    if rows.refused:
        seen += f" ({rows.refused[0]})"
    return Finding("rows", "wrong", seen, *_cause_of_rows(rows, rollout))


def _cause_of_rows(rows: CheckedRows, rollout: VerifiedRollout) -> tuple[str, str]:
    if rows.all_zero and 2 * rows.all_zero >= rows.invalid:
        return (
            f"all-zero capture: {rows.all_zero} rows hold nothing but expert 0, as kernels leave them that route "
            "inside and report nothing",
            "use vLLM 0.28 or later, or a MoE backend that is not monolithic; with zeros in one layer only, look for "
            "layers that are mapped by order instead of by index",
        )
    if rows.out_of_range:
        return (
            f"{rows.out_of_range} rows name experts that the model does not have: the routes of another model, or "
            "ids of physical experts where the engine balances them over devices",
            "let the engine serve this model, and switch its expert load balancing off",
        )
    if rows.invalid:
        return (
            "rows that no router can have selected, or routes of another shape: the layers, or the model, are not "
            "those that train",
            "let the engine serve this model; its record has one slot per MoE layer or one per decoder layer, without "
            "those of multi-token prediction",
        )
    if rows.missing == rows.expected:
        return "no sample has routes: the engine does not capture them, a missing flag", VLLM_FLAG
    if rows.missing_at_start == rows.missing:
        return (
            "rows are missing at the beginning of samples: those of tokens that a prefix cache served without a "
            "forward",
            "use vLLM 0.22 or later, and leave its prefix caching on from 0.31 on, where the cache keeps the routes",
        )
    if rows.missing_at_end == rows.missing:
        return (
            "rows are missing at the end of samples: the records are shorter than their tokens",
            "return prompt + completion - 1 rows a sample, cut where its tokens are cut",
        )
    return (
        "rows are missing inside of samples: forwards that nothing recorded, of requests that were evicted, say",
        "give the engine more cache, and use one version of it throughout",
    )


def executed_finding(executed: Executed, record: Tensor, replay: RouterReplay) -> Finding:
    """Whether the experts were given the recorded ids, in every layer and call."""
    per_layer = executed.other_rows(record, replay.moe_layers)
    unseen = [layer for layer in replay.moe_layers if layer not in per_layer]
    other = {layer: count for layer, count in per_layer.items() if count}
    rows = int((record[:, :, 0, 0] >= 0).sum())
    seen = f"{sum(other.values())} of {rows * len(per_layer)} (row, layer) pairs executed other ids than recorded"
    if unseen:
        seen += f"; in layers {_listed(unseen)} nothing shows which ids ran"
    if not other:
        return Finding("executed ids", "not judged" if rows == 0 or not per_layer else "right", seen)
    return Finding(
        "executed ids",
        "wrong",
        f"{seen}, in layers {_listed(other)}",
        "something between router and experts bypasses the replay: a fused block, a swapped kernel, a replaced module",
        "attach after whatever replaces modules, and set `use_kernels=False`",
    )


def agreement_finding(statistics: Verdict | None, verdict: Verdict | None, rows: int) -> Finding:
    """Whether the record belongs to its tokens: the alarm's judgement, in its words."""
    if statistics is None:
        return Finding("agreement", "not judged", "no row has a record on both sides")
    seen = (
        f"agreement (kappa) {statistics.agreement:.2f} or more in each layer, contrast "
        f"{statistics.pooled_contrast:.2f} over all of them, {rows} rows"
    )
    if verdict is None:
        return Finding("agreement", "not judged", f"{seen}: too few to judge")
    if verdict.found is None:
        if statistics.agreement != statistics.agreement:
            return Finding("agreement", "not judged", f"{seen}: all tokens go to the same experts")
        return Finding("agreement", "right", seen)
    fact = f"the record of the rollout is not that of its tokens: {verdict.found.fact}"
    return Finding("agreement", "wrong", fact, *_CAUSES[verdict.found.kind])


# what is wrong with a record: its likely cause, and what to do
_CAUSES = {
    Fault.MOVED: (
        "rows are shifted by one token: the record does not begin with the row of the first prompt token",
        "row p is the routing of input token p; drop or add what stands before the first",
    ),
    Fault.CONSTANT_LAYER: (
        "a layer repeats one row: kernels that report nothing, or a buffer that was never filled",
        "use vLLM 0.28 or later, or a MoE backend that is not monolithic",
    ),
    Fault.OTHER_LAYER: (
        "layers are shifted: the record's slots are those of other layers, as where dense layers are counted on one "
        "side only",
        "map layers by the index of the decoder layer, dense ones included, and leave out those of multi-token "
        "prediction",
    ),
    Fault.OTHER_WEIGHTS: (
        "the engine serves other weights than those that score",
        "synchronise the weights; with an adapter, merge it into what the engine serves",
    ),
    Fault.OTHER_SAMPLES: (
        "these are the routes of other tokens or samples, or of other weights",
        "check the order in which samples are returned, and that the engine serves the weights that score",
    ),
}
_CAUSES[Fault.OTHER_TOKENS] = _CAUSES[Fault.OTHER_SAMPLES]


def mismatch_finding(
    name: str, train: Tensor, rollout: Tensor, mask: Tensor, bound: float | None, of_padding: float
) -> Finding:
    """
    k3 and F(2) of the sampled tokens, (B, C) each; with a bound, whether k3 is within it.

    `of_padding` is the k3 that padding alone makes.
    """
    k3, extreme = float(k3_kl(train, rollout, mask)), float(extreme_token_frac(train, rollout, mask))
    seen = f"k3 {k3:.2e}, F(2) {extreme:.2%}"
    lost = int((train.isnan() & ~rollout.isnan() & mask.bool()).sum())
    if bound is not None and lost:
        return Finding(
            name,
            "wrong",
            f"{seen}: training scores {lost} of {int(mask.sum())} tokens as NaN",
            "the training forward leaves the range of its dtype, or a weight is NaN",
            "pass `--dtype float32`; if that does not help, look for the weight, and train from an earlier checkpoint",
        )
    if bound is None or k3 != k3:
        return Finding(name, "not judged", seen)
    if k3 <= bound:
        return Finding(name, "right", seen)
    cause, remedy = (
        "rollout and training score the same tokens differently, and routing does not explain it: other weights, "
        "log-probabilities of another kind, or a forward that depends on padding or on the cache",
        "mend what else is wrong here first; then check that the engine serves these weights",
    )
    if of_padding > bound:
        cause, remedy = (
            "the forward of this model depends on padding: a sample scored alone and behind padding differs by a k3 "
            f"of {of_padding:.2e}, with live routing",
            "train on prompts of one length, or with a Transformers whose forward of this model leaves padding out",
        )
    return Finding(name, "wrong", f"{seen}, expected a k3 of {bound:g} at most", cause, remedy)


def changed_finding(changed: int, compared: int) -> Finding:
    """How far live routing would have been from the record; no judgement."""
    share = changed / compared if compared else float("nan")
    return Finding("live routing", "not judged", f"{share:.2%} of routers would select another set")


def gradients_finding(runs: dict[str, Gradients], record: Tensor, replay: RouterReplay) -> Finding:
    """Whether each kind of checkpointing gives the gradients of none, and recomputes through the record."""
    own = runs["none"].values
    if not own:
        return Finding("gradients with checkpointing", "not judged", "no gradient reached the input embedding")
    facts, wrong, idle = [], [], False
    for kind, run in runs.items():
        if kind == "none":
            continue
        other = sum(run.executed.other_rows(record, replay.moe_layers).values())
        if run.error is not None:
            facts.append(f"{kind}: {run.error}")
            wrong.append(kind)
            continue
        if run.values.keys() != own.keys():
            distance, tolerance = float("inf"), 0.0
        else:
            distance = max((_distance(run.values[name], own[name]) for name in own), default=0.0)
            tolerance = max((GRADIENT_TOLERANCE.get(g.dtype, _COARSE) for g in own.values()), default=0.0)
        facts.append(f"{kind}: largest difference {distance:.1e}, {other} rows recomputed otherwise")
        idle = idle or run.executed.calls == 1
        if other or not distance <= tolerance:
            wrong.append(kind)
    seen = "; ".join(facts)
    if not wrong and idle:
        return Finding("gradients with checkpointing", "not judged", f"{seen}; nothing was recomputed")
    if not wrong:
        return Finding("gradients with checkpointing", "right", seen)
    return Finding(
        "gradients with checkpointing",
        "wrong",
        seen,
        f"with {_listed(wrong)} checkpointing, backward recomputes something else than the forward ran",
        "checkpoint with `model.gradient_checkpointing_enable()` only, or train without",
    )


def _distance(one: Tensor, other: Tensor) -> float:
    scale = float(other.abs().max()) or 1.0
    return float((one - other).abs().max()) / scale


def _listed(items: Iterable[object]) -> str:
    names = [str(item) for item in items]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
