"""Independent witnesses: records of nobody, comparisons by sets, and gates without float32 in them.

Nothing here uses trl_r3, so that no test compares the package with itself. What experts executed is seen by
`trl_r3.cli.experts`, which knows nothing of routers and replay.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CHECKPOINTING = ["none", "non-reentrant", "reentrant"]


def stacked(seen: dict[int, list[Tensor]], batch: int, call: int = 0) -> Tensor:
    """What `executed_ids` saw in one call of every layer, as `(B, T, L, K)`."""
    return torch.stack([seen[layer][call] for layer in sorted(seen)], dim=1).unflatten(0, (batch, -1)).long()


def foreign_record(replay, batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Random distinct ids `(B, T, L, K)`: no router selected them."""
    generator = torch.Generator().manual_seed(seed)
    size = (batch, tokens, len(replay.moe_layers), replay.num_experts)
    return torch.rand(size, generator=generator).argsort(-1)[..., : replay.top_k]


def some_rows(count: int, generator: torch.Generator) -> Tensor:
    """`(count, 3, 2)` of distinct ids of 100 experts a row, hardly ever the same twice."""
    first = torch.randint(100, (count, 3, 1), generator=generator)
    second = (first + torch.randint(1, 100, (count, 3, 1), generator=generator)) % 100
    return torch.cat([first, second], dim=2).to(torch.uint8)


def padded(rows: Tensor, mask: Tensor) -> Tensor:
    """`(B, T, K)` of what experts saw of a batch: all of it, or its real tokens, beside which there is -1."""
    if len(rows) == mask.numel():
        return rows.unflatten(0, mask.shape)
    whole = rows.new_full((*mask.shape, rows.shape[-1]), -1)
    whole[mask.bool()] = rows
    return whole


def give_forward(module: nn.Module, forward: Callable) -> None:
    """Let a module run `forward(own, *args)` as a class of its own would: no watcher put it in place of another."""
    own = type(module).forward
    members = {"forward": lambda self, *args, **kwargs: forward(partial(own, self), *args, **kwargs)}
    module.__class__ = type(type(module).__name__, (type(module),), members)


def bend_gate(monkeypatch, router_class: type) -> None:
    """Put the weights of a class of routers off by a factor that no argument of a gate explains."""
    own = router_class.forward

    def forward(self, hidden_states):
        logits, weights, ids = own(self, hidden_states)
        return logits, weights * 1.01, ids

    monkeypatch.setattr(router_class, "forward", forward)


def as_sets(ids: Tensor) -> Tensor:
    """The order of the ids of a row says nothing."""
    return ids.long().sort(-1).values


def changed_rows(one: Tensor, other: Tensor) -> Tensor:
    """`(B, T, L)`: where two selections differ as sets."""
    return (as_sets(one) != as_sets(other)).any(-1)


def use_checkpointing(model: nn.Module, kind: str) -> None:
    """Switch it on in training mode, where it applies; models here have no dropout."""
    model.train()
    if kind == "none":
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Take the gradients off a model."""
    taken = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return taken


def differing(one: dict[str, Tensor], other: dict[str, Tensor], rtol: float = 0.0) -> list[str]:
    """Names whose tensors differ: in any bit, or with `rtol` by more than this share of the largest element."""
    assert one.keys() == other.keys() and one
    if not rtol:
        return [name for name in one if not torch.equal(one[name], other[name])]
    return [name for name in one if (one[name] - other[name]).abs().max() > rtol * other[name].abs().max()]


class InDouble(TorchFunctionMode):
    """Gates compute in float32 whatever the dtype of the model; under this mode they take float64 instead."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def kept_rows(mask) -> list[list[int]]:
    """The kept ids of a sampling mask, a list a token."""
    return [mask.ids[a:b].tolist() for a, b in zip(mask.offsets[:-1], mask.offsets[1:], strict=True)]


def some_kept(tokens: list[int]) -> list[list[int]]:
    """Kept ids of nobody, a list a token, among them the token."""
    return [sorted({token, token + 1 + i, token + 7}) for i, token in enumerate(tokens)]
