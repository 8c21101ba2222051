"""The gating op in the place of a router's own code: the same ids, weights and gradients, or it stays away."""

import pytest
import torch
from model_zoo import MOE_MODEL_TYPES, build_tiny

from trl_r3 import RouterReplay, UnsupportedRouterError
from trl_r3.routers.gated import GatedRouter

# The op has no argument for these gates: weights scaled per expert, a bias or state that the block passes in, sink
# experts, a scatter, a gate inside the block, or no top-k at all.
NOT_COVERED = {
    "afmoe", "dbrx", "doge", "ernie4_5_moe", "gemma4", "gemma4_text", "hy_v3", "inkling_text", "jetmoe", "kolibri1",
    "laguna", "lfm2_moe", "llama4", "llama4_text", "minimax_m2", "phimoe", "zaya",
}  # fmt: skip
COVERED = [model_type for model_type in MOE_MODEL_TYPES if model_type not in NOT_COVERED]


def batch() -> torch.Tensor:
    return torch.randint(2, 120, (2, 12), generator=torch.Generator().manual_seed(0))


def replayed(model, gating: str, routes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Logits, all gradients, and the number of changed routers."""
    replay = RouterReplay(model, gating=gating)
    try:
        model.zero_grad()
        with replay.replay(routes) as stats:
            logits = model(batch(), use_cache=False).logits
        logits.float().log_softmax(-1)[..., 0].sum().backward()
    finally:
        replay.remove()
    grads = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    return logits.detach(), grads, int(stats.changed_routers)


@pytest.mark.parametrize("model_type", COVERED)
def test_the_op_equals_interception(model_type):
    model = build_tiny(model_type)
    replay = RouterReplay(model)
    with torch.no_grad(), replay.record() as recorded:
        live = model(batch()).logits
    replay.remove()
    foreign = (recorded.routed_experts + 1) % replay.num_experts
    logits, grads, changed = replayed(model, "intercept", foreign)
    assert changed > 0 and not torch.allclose(logits, live), "the foreign record must matter"
    op_logits, op_grads, op_changed = replayed(model, "op", foreign)
    torch.testing.assert_close(op_logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(op_grads, grads, rtol=1e-3, atol=1e-4 * float(grads.abs().max()))
    assert op_changed == changed


def test_no_router_is_left_out_without_notice():
    refused = set()
    for model_type in sorted(NOT_COVERED):
        with pytest.raises(UnsupportedRouterError):
            RouterReplay(build_tiny(model_type), gating="op")
        refused.add(model_type)
    assert refused == NOT_COVERED


def test_the_choice_is_visible():
    model = build_tiny("qwen3_moe")
    for gating in ("op", "intercept"):
        replay = RouterReplay(model, gating=gating)
        assert f"gating={gating!r}" in repr(replay)
        assert all(isinstance(router, GatedRouter) == (gating == "op") for router in replay._routers)
        replay.remove()
    with pytest.raises(ValueError, match="gating"):
        RouterReplay(model, gating="fast")


def test_a_bias_that_moves_is_followed():
    """The selection bias of these routers is a buffer that training moves: it must be read, not remembered."""
    model = build_tiny("deepseek_v3")
    replay = RouterReplay(model, gating="op")
    with torch.no_grad(), replay.record() as recorded:
        model(batch())
    routes = recorded.routed_experts
    with torch.no_grad(), replay.replay(routes) as before:
        model(batch())
    router = replay._routers[0]
    assert router.formula.bias == "e_score_correction_bias"
    router.module.e_score_correction_bias += torch.randn(
        replay.num_experts, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad(), replay.replay(routes) as after:
        model(batch())
    replay.remove()
    assert int(before.changed_routers) == 0 and int(after.changed_routers) > 0


def test_missing_rows_route_live():
    model = build_tiny("mixtral")
    replay = RouterReplay(model, gating="op")
    with torch.no_grad(), replay.record() as recorded:
        live = model(batch()).logits
    foreign = (recorded.routed_experts + 1) % replay.num_experts
    foreign[:, :6] = -1
    with torch.no_grad(), replay.replay(foreign):
        logits = model(batch()).logits
    replay.remove()
    torch.testing.assert_close(logits[:, :6], live[:, :6], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits[:, 6:], live[:, 6:])


def test_a_gate_that_is_off_is_not_replaced(monkeypatch):
    """A router whose weights are off by a factor that no argument explains keeps its own code."""
    model = build_tiny("mixtral")
    router_class = type(model.model.layers[0].mlp.gate)
    own = router_class.forward

    def forward(self, hidden_states):
        logits, weights, ids = own(self, hidden_states)
        return logits, weights * 1.01, ids

    monkeypatch.setattr(router_class, "forward", forward)
    with pytest.raises(UnsupportedRouterError, match="does not cover"):
        RouterReplay(model, gating="op")
    replay = RouterReplay(model)
    assert "intercept" in repr(replay)
    replay.remove()
