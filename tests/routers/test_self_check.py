"""The check of a router runs the real one: what it refuses is named, and the forward around it ends."""

from __future__ import annotations

import pytest
from routers.left_behind import same_traces, traces

from trl_r3 import RouterReplay, UnsupportedRouterError
from trl_r3.routers import discovery


def test_router_that_ignores_the_record_is_refused(qwen, ids):
    """The self-check runs the real router: one that selects again by itself must not pass."""
    gate = qwen.model.layers[3].mlp.gate
    own = type(gate).forward

    def selects_again(hidden):
        logits, weights, chosen = own(gate, hidden)
        return logits, weights, logits.argsort(-1, descending=True)[:, :2]

    before = traces(qwen)
    gate.forward = selects_again
    with pytest.raises(UnsupportedRouterError, match=r"layers\.3\.mlp\.gate \(Qwen3MoeTopKRouter, 2 of 8 experts\)"):
        RouterReplay(qwen)
    del gate.forward
    assert same_traces(traces(qwen), before)


def test_a_check_that_fails_lets_the_forward_end(qwen, monkeypatch):
    """With sharded weights other processes go on to gather those of later layers, and would wait for this one."""
    ran = []
    for index, layer in enumerate(qwen.model.layers):
        layer.register_forward_hook(lambda module, args, output, index=index: ran.append(index))
    failing = discovery.check_router

    def check(router, *args, **kwargs):
        if router.layer == 1:
            raise UnsupportedRouterError("the check failed here")
        return failing(router, *args, **kwargs)

    monkeypatch.setattr(discovery, "check_router", check)
    with pytest.raises(UnsupportedRouterError, match="the check failed here"):
        RouterReplay(qwen)
    assert ran == list(range(len(qwen.model.layers))) * 2
    assert not any("forward" in vars(module) for module in qwen.modules())
