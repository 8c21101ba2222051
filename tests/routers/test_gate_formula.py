"""What a router adds to its scores, found while it is still zero: an op that missed it would tell and select wrongly.

Legend: N tokens of a forward, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import foreign_record
from torch import nn

from trl_r3 import RouterReplay, UnsupportedRouterError

E, K = 8, 2
MOVED = torch.linspace(-1, 1, E)[[3, 0, 6, 1, 7, 4, 2, 5]]


class Gate(nn.Module):
    """Sigmoid scores; a bias and a counter of tokens by expert, both zero."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.register_buffer("tokens_by_expert", torch.zeros(E))
        self.selects = nn.Parameter(torch.zeros(E), requires_grad=False)

    def logits(self, hidden_NH):
        return F.linear(hidden_NH.flatten(0, -2), self.weight)

    def forward(self, hidden_states):
        logits = self.logits(hidden_states)
        scores = logits.sigmoid()
        ids = torch.topk(scores + self.selects, K, dim=-1)[1]
        weights = scores.gather(1, ids)
        return logits, weights / weights.sum(-1, keepdim=True), ids


class NamedBias(Gate):
    """Its selection bias has the name that others give the bias of their logits."""

    def __init__(self, weight):
        super().__init__(weight)
        self.bias = self.selects
        del self.selects

    @property
    def selects(self):
        return self.bias


class LogitBias(Gate):
    def __init__(self, weight):
        super().__init__(weight)
        self.bias = nn.Parameter(torch.zeros(E), requires_grad=False)

    def logits(self, hidden_NH):
        return F.linear(hidden_NH.flatten(0, -2), self.weight, self.bias)


class Scaled(Gate):
    """Weights times a number of each expert, which is 1 while it is new."""

    def __init__(self, weight):
        super().__init__(weight)
        self.by_expert = nn.Parameter(torch.ones(E), requires_grad=False)

    def forward(self, hidden_states):
        logits, weights, ids = super().forward(hidden_states)
        return logits, weights * self.by_expert[ids], ids


class Detached(Gate):
    def forward(self, hidden_states):
        logits, weights, ids = super().forward(hidden_states)
        return logits, weights.detach(), ids


def with_gates(model, gate):
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate = gate(layer.mlp.gate.weight)
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def replayed(model, record, ids, gating, gates, name):
    """Logits, how many routers changed, and the gradients of routers, with a tensor that was zero while attaching."""
    with RouterReplay(model, gating=gating) as replay:
        for gate in gates:
            getattr(gate, name).data += MOVED
        with replay.replay(record) as stats:
            out = model(ids, labels=ids)
        out.loss.backward()
    for gate in gates:
        getattr(gate, name).data.zero_()
    grads = [gate.weight.grad for gate in gates]
    model.zero_grad(set_to_none=True)
    return out.logits.detach(), int(stats.changed_routers), grads


@pytest.mark.parametrize(
    ("gate", "name"), [(Gate, "selects"), (Gate, "tokens_by_expert"), (LogitBias, "bias"), (LogitBias, "selects")]
)
def test_what_is_zero_while_attaching_is_followed(qwen, ids, gate, name):
    gates = with_gates(qwen, gate)
    with RouterReplay(qwen) as replay:
        record = foreign_record(replay, *ids.shape)
        record[:, ::3] = -1  # these select live
    logits, changed, grads = replayed(qwen, record, ids, "intercept", gates, name)
    op_logits, op_changed, op_grads = replayed(qwen, record, ids, "op", gates, name)
    assert op_changed == changed > 0
    torch.testing.assert_close(op_logits, logits, rtol=1e-4, atol=1e-5)
    for one, other in zip(op_grads, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("gate", [NamedBias, Scaled, Detached])
def test_what_the_op_has_no_argument_for_is_intercepted(qwen, gate):
    with_gates(qwen, gate)
    with pytest.raises(UnsupportedRouterError, match=r"layers\.1\.mlp\.gate .* does not cover its gate"):
        RouterReplay(qwen, gating="op")
    assert "gating='intercept'" in repr(RouterReplay(qwen))
