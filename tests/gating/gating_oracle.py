"""The definition of masked top-k gating as loops over Python floats, and the cases that tests compare it on.

Nothing here is shared with the package. Shape legend: T tokens, E experts, K experts per token.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SMALLEST = {torch.float64: 1e-300, torch.float32: 1e-30, torch.float16: 6e-8, torch.bfloat16: 1e-30}


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    total = math.fsum(powers)
    return [p / total for p in powers]


def naive_scores(row: list[float], score: str) -> list[float]:
    if score == "softmax":
        return softmax(row)
    if score == "sigmoid":
        return [1.0 / (1.0 + math.exp(-x)) for x in row]
    if score == "sqrtsoftplus":
        return [math.sqrt(softplus(x)) for x in row]
    return row


def naive_live(row: list[float], options: dict[str, Any], top_k: int) -> list[int]:
    n_group, bias = options["n_group"], options["bias"]
    key = row if bias is None and n_group == 1 else naive_scores(row, options["score"])
    if bias is not None:
        key = [a + b for a, b in zip(key, bias, strict=True)]
    size = len(row) // n_group
    best = []
    for group in range(n_group):
        members = sorted(key[group * size : (group + 1) * size], reverse=True)
        best.append(sum(members[:2]) if options["group_score"] == "top2_sum" and n_group > 1 else members[0])
    groups = sorted(range(n_group), key=lambda g: (-best[g], g))[: options["topk_group"]]
    allowed = [e for e in range(len(row)) if e // size in groups]
    return sorted(allowed, key=lambda e: (-key[e], e))[:top_k]


def naive_weights(row: list[float], ids: list[int], options: dict[str, Any]) -> list[float]:
    score, eps = options["score"], options["eps"]
    chosen = [row[e] for e in ids]
    if score == "topk_softmax":
        values = softmax(chosen)
    elif score == "softmax" and options["renormalize"] and eps == 0.0:
        top = max(chosen)  # any common factor cancels, and this one keeps far-away experts from underflowing
        values = [math.exp(x - top) for x in chosen]
    else:
        every = naive_scores(row, score)
        values = [every[e] for e in ids]
    if options["renormalize"]:
        total = math.fsum(values) + eps
        values = [v / total for v in values]
    return [v * options["scale"] for v in values]


def status_of_row(given: list[int], live: list[int], num_experts: int, missing: int, compare_live: bool) -> int:
    if missing in given:
        return 2
    if not all(0 <= e < num_experts for e in given) or len(set(given)) < len(given):
        return 3
    return 1 if compare_live and set(given) != set(live) else 0


def naive_gating(
    logits: torch.Tensor, top_k: int, recorded: torch.Tensor | None, options: dict[str, Any]
) -> tuple[list[list[float]], list[list[int]], list[int]]:
    options = options | {"bias": None if options["bias"] is None else options["bias"].double().tolist()}
    weights, all_ids, all_status = [], [], []
    for t, row in enumerate(logits.double().tolist()):
        ids, status = naive_live(row, options, top_k), 0
        if recorded is not None:
            given, mark = recorded[t].tolist(), 255 if recorded.dtype == torch.uint8 else -1
            status = status_of_row(given, ids, len(row), mark, options["compare_live"])
            ids = given if status < 2 else ids
        all_ids.append(ids)
        all_status.append(status)
        weights.append(naive_weights(row, ids, options))
    return weights, all_ids, all_status


@dataclass(frozen=True)
class Case:
    """One gating problem. `missing` and `invalid` are shares of rows; without `ids` there is no record."""

    num_tokens: int = 24
    num_experts: int = 16
    top_k: int = 4
    dtype: torch.dtype = torch.float32
    ids: torch.dtype | None = torch.int64
    missing: float = 0.25
    invalid: float = 0.2
    with_bias: bool = False
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        short = [f"{self.num_experts}e{self.top_k}", str(self.dtype)[6:], str(self.ids)[6:] if self.ids else "live"]
        return "-".join(short + ["bias"] * self.with_bias + [f"{k}={v}" for k, v in self.options.items()])

    def but(self, **changes: Any) -> "Case":
        return replace(self, **changes)

    def all_options(self) -> dict[str, Any]:
        defaults = {"score": "softmax", "renormalize": True, "bias": None, "n_group": 1, "topk_group": 1}
        defaults |= {"group_score": "top2_sum", "eps": 0.0, "scale": 1.0, "compare_live": True}
        if self.with_bias:
            generator = torch.Generator().manual_seed(self.seed + 1)
            defaults["bias"] = torch.randn(self.num_experts, generator=generator) * 0.3
        return defaults | self.options

    def logits(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.num_tokens, self.num_experts, generator=generator, dtype=torch.float64)
        return (x * 2).to(self.dtype)

    def recorded(self) -> torch.Tensor | None:
        """Foreign ids: a random permutation per row, some rows missing, some damaged in every way there is."""
        if self.ids is None:
            return None
        generator = torch.Generator().manual_seed(self.seed + 2)
        order = torch.rand(self.num_tokens, self.num_experts, generator=generator).argsort(-1)[:, : self.top_k]
        mark = 255 if self.ids == torch.uint8 else -1
        damage = [self.num_experts] if self.ids == torch.uint8 else [self.num_experts, -2, torch.iinfo(self.ids).min]
        draw = torch.rand(self.num_tokens, generator=generator)
        for t in range(self.num_tokens):
            slot = t % self.top_k
            if draw[t] < self.missing:
                order[t, slot if t % 2 else slice(None)] = mark
            elif draw[t] < self.missing + self.invalid:
                twin = order[t, slot - 1] if self.top_k > 1 else self.num_experts
                order[t, slot] = (damage + [twin])[t % (len(damage) + 1)]
        return order.to(self.ids)


class Tied(Case):
    """Logits on a coarse grid: almost every row ties at the edge of its top-k."""

    def logits(self) -> torch.Tensor:
        return (super().logits() * 1.5).round() / 1.5


class TiedRecord(Tied):
    """The live selection as record, in every second row with its last expert replaced by the next in rank."""

    def recorded(self) -> torch.Tensor:
        k, rows = self.top_k, []
        for t, row in enumerate(self.logits().double().tolist()):
            order = sorted(range(len(row)), key=lambda e: (-row[e], e))
            rows.append((order[: k - 1] + [order[k - 1 + t % 2]])[::-1])
        return torch.tensor(rows, dtype=self.ids)


def check_case(gating: Any, case: Case) -> None:
    """Assert that `gating` computes what the loops compute on `case`."""
    options, logits, recorded = case.all_options(), case.logits(), case.recorded()
    out = gating(logits, case.top_k, recorded, **options)
    weights, ids, status = naive_gating(logits, case.top_k, recorded, options)
    assert out.weights.dtype == case.dtype
    assert out.expert_ids.dtype == torch.int64
    assert out.expert_ids.tolist() == ids
    assert out.status.dtype == torch.uint8
    assert out.status.tolist() == status
    expected = torch.tensor(weights, dtype=torch.float64).view(case.num_tokens, case.top_k)
    torch.testing.assert_close(out.weights.double(), expected, rtol=TOLERANCE[case.dtype], atol=SMALLEST[case.dtype])


UNCOMPARED = [(16, 4, torch.float32), (64, 8, torch.bfloat16), (96, 16, torch.float16), (60, 4, torch.float64)]


def cases() -> list[Case]:
    """Every score and option once, every dtype and id dtype, and the shapes of models."""
    base = Case()
    found = [
        base.but(options={"score": score, "renormalize": renormalize, "eps": eps, "scale": 2.5})
        for score in ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus")
        for renormalize in (True, False)
        for eps in (0.0, 1e-2)
    ]
    found += [base.but(dtype=dtype, num_experts=64) for dtype in TOLERANCE]
    found += [base.but(dtype=d, num_experts=64, options={"renormalize": False}) for d in TOLERANCE]
    found += [base.but(ids=ids, num_experts=200) for ids in (None, torch.uint8, torch.int16, torch.int32)]
    found += [base.but(ids=ids, missing=m, invalid=0.0) for ids in (torch.uint8, torch.int16) for m in (0.0, 1.0)]
    shapes = [(1, 1), (8, 2), (60, 4), (128, 8), (256, 8), (512, 10), (96, 16), (64, 32), (1024, 32), (33, 33)]
    found += [
        base.but(num_experts=e, top_k=k, dtype=dtype)
        for e, k in shapes
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    found += [base.but(with_bias=True, options={"score": s}) for s in ("softmax", "topk_softmax", "sigmoid")]
    found += [base.but(with_bias=True, dtype=torch.bfloat16, options={"score": "sqrtsoftplus", "renormalize": False})]
    groups = {"n_group": 4, "topk_group": 2}
    found += [
        base.but(with_bias=bias, num_experts=32, options=groups | {"score": score, "group_score": rank})
        for bias in (False, True)
        for score in ("softmax", "sigmoid", "topk_softmax", "sqrtsoftplus")
        for rank in ("top2_sum", "max")
    ]
    found += [base.but(num_experts=e, top_k=k, dtype=d, options={"compare_live": False}) for e, k, d in UNCOMPARED]
    deepseek = {"score": "sigmoid", "n_group": 8, "topk_group": 4, "eps": 1e-20, "scale": 2.5}
    return found + [base.but(num_experts=256, top_k=8, with_bias=True, options=deepseek)]
