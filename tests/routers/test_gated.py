"""The gating op in the place of a router's own code: the same ids, weights and gradients, or it stays away."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from model_zoo import MOE_MODEL_TYPES, build_tiny
from oracles import bend_gate, foreign_record
from routers.blocks import batch
from supported_models import listed_types

from trl_r3 import RouterReplay, UnsupportedRouterError
from trl_r3.routers.gate_formula import GateFormula
from trl_r3.routers.gated import GatedRouter

# The op has no argument for these gates: weights scaled per expert, a bias or state that the block passes in, sink
# experts, a scatter, a gate inside the block, or no top-k at all. Or their weight is that of a module inside them.
NOT_COVERED = {
    "afmoe", "dbrx", "doge", "ernie4_5_moe", "gemma4", "gemma4_text", "hunyuan_v1_moe", "hy_v3",
    "inkling_text", "jetmoe", "kolibri1", "lfm2_moe", "llama4", "llama4_text", "longcat_flash", "minimax_m2",
    "phimoe", "zaya",
}  # fmt: skip
COVERED = [model_type for model_type in MOE_MODEL_TYPES if model_type not in NOT_COVERED]


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
    if model_type not in listed_types():
        try:
            RouterReplay(model, "op").remove()
        except UnsupportedRouterError as error:
            pytest.skip(f"{model_type} came with a later Transformers than the page of types, and is refused: {error}")
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
        assert all(isinstance(router, GatedRouter) == (gating == "op") for router in replay.routers)
        replay.remove()
    with pytest.raises(ValueError, match="gating"):
        RouterReplay(model, gating="fast")


def test_a_bias_that_the_block_holds_is_found_while_it_is_zero():
    """The block gives it to its router: the op, which had no such argument, would go on without it."""
    model = build_tiny("minimax_m2")
    biases = [each for name, each in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for bias in biases:
        bias.zero_()
    assert biases
    with pytest.raises(UnsupportedRouterError, match="does not cover its gate"):
        RouterReplay(model, gating="op")


def test_a_bias_that_moves_is_followed():
    """The selection bias of these routers is a buffer that training moves: it must be read, not remembered."""
    model = build_tiny("deepseek_v3")
    replay = RouterReplay(model, gating="op")
    with torch.no_grad(), replay.record() as recorded:
        model(batch())
    routes = recorded.routed_experts
    with torch.no_grad(), replay.replay(routes) as before:
        model(batch())
    router = replay.routers[0]
    assert router.formula.bias == "e_score_correction_bias"
    router.module.e_score_correction_bias += torch.randn(
        replay.num_experts, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad(), replay.replay(routes) as after:
        model(batch())
    replay.remove()
    assert int(before.changed_routers) == 0 and int(after.changed_routers) > 0


def keep(gates, module, args, output):
    gates.append(output)


AUTOCAST = torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "flint"])
@pytest.mark.parametrize(
    ("attached", "used", "around"),
    [
        (torch.float32, torch.float32, AUTOCAST),
        (torch.float32, torch.bfloat16, nullcontext()),
        (torch.bfloat16, torch.float32, nullcontext()),
        (torch.bfloat16, torch.bfloat16, AUTOCAST),
    ],
)
def test_in_other_dtypes_than_while_attaching_it_is_the_routers_own_gate(model_type, attached, used, around):
    """A loop enters autocast around its forward, not around attaching; routers compute in float32 all the same."""
    results = []
    for gating in ("intercept", "op"):
        model = build_tiny(model_type, dtype=attached)
        replay = RouterReplay(model, gating=gating)
        model.to(used)
        record = foreign_record(replay, *batch().shape)
        record[:, ::3] = -1
        gates: list[tuple] = []
        for router in replay.routers:
            router.module.register_forward_hook(partial(keep, gates))
        with around, replay.replay(record) as stats:
            logits = model(batch(), use_cache=False).logits
        logits.float().log_softmax(-1)[..., 0].sum().backward()
        grads = [router.module.weight.grad for router in replay.routers]
        results.append([*(tensor for gate in gates for tensor in gate), logits, *grads, stats.changed_routers])
    for own, op in zip(*results, strict=True):
        assert own.dtype == op.dtype and torch.equal(own, op)


@pytest.mark.parametrize(("name", "value"), [("norm_topk_prob", False), ("top_k", 3)])
def test_a_gate_that_is_set_otherwise_later_is_told(qwen, name, value):
    """The op would go on with the gate that was there; interception runs the router's own code."""
    with torch.no_grad(), RouterReplay(qwen) as replay, replay.record() as recorded:
        qwen(batch())
    routes = recorded.routed_experts
    with RouterReplay(qwen, gating="op") as replay:
        replayed_logits(qwen, replay, routes)
        before = getattr(replay.routers[-1].module, name)
        setattr(replay.routers[-1].module, name, value)
        with pytest.raises(RuntimeError, match=f"`{name}` of .*gate is {value}, but was {before} .* Attach again"):
            replayed_logits(qwen, replay, routes)
        setattr(replay.routers[-1].module, name, before)
    with RouterReplay(qwen, gating="intercept") as replay:
        logits = replayed_logits(qwen, replay, routes)
        replay.routers[-1].module.norm_topk_prob = False
        assert not torch.allclose(replayed_logits(qwen, replay, routes), logits)


def replayed_logits(model, replay: RouterReplay, routes: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), replay.replay(routes):
        return model(batch()).logits


@pytest.mark.parametrize("counts", [0, 1])
def test_a_router_that_counts_is_intercepted(qwen, counts):
    """Its settings change with each forward, so nobody could tell which of them matter to its gate."""
    for gate in [module for name, module in qwen.named_modules() if name.endswith("mlp.gate")]:

        class Counting(type(gate)):
            calls = 0

            def forward(self, hidden):
                self.calls += counts
                return super().forward(hidden)

        gate.__class__, gate.calls = Counting, 0
    if counts:
        with pytest.raises(UnsupportedRouterError, match="does not cover its gate"):
            RouterReplay(qwen, gating="op")
    else:
        RouterReplay(qwen, gating="op").remove()


def test_changed_routers_are_told_by_layer():
    """In the order of the layers, also where only some of them are gated by the op."""
    model = build_tiny("qwen3_moe")
    intercepted = RouterReplay(model)
    with torch.no_grad(), intercepted.record() as recorded:
        model(batch())
    intercepted.remove()
    last = len(intercepted.moe_layers) - 1
    routes = recorded.routed_experts.clone()
    routes[:, :, last] = (routes[:, :, last] + 1) % intercepted.num_experts
    assert last > 0
    for mixed in (False, True):
        with RouterReplay(model, gating="op") as replay:
            if mixed:
                replay.routers[last] = intercepted.routers[last]
            with torch.no_grad(), replay.replay(routes) as stats:
                model(batch())
        assert stats.changed_by_layer[:last].tolist() == [0] * last
        assert stats.changed_by_layer[last] == stats.changed_routers > 0


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
    bend_gate(monkeypatch, type(model.model.layers[0].mlp.gate))
    with pytest.raises(UnsupportedRouterError, match="does not cover"):
        RouterReplay(model, gating="op")
    replay = RouterReplay(model)
    assert "intercept" in repr(replay)
    replay.remove()


class _LinearOfItsOwn(torch.autograd.Function):
    """`F.linear` as DeepSpeed replaces it under ZeRO-3: torch functions run inside, out of sight of autograd."""

    @staticmethod
    def forward(ctx, hidden, weight, bias):
        ctx.save_for_backward(hidden, weight)
        return hidden.matmul(weight.t()) if bias is None else hidden.matmul(weight.t()) + bias

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        products = grad.matmul(weight), flat.t().matmul(hidden.reshape(-1, hidden.shape[-1]))
        return *products, flat.sum(0) if ctx.needs_input_grad[2] else None


def linear_of_its_own(hidden, weight, bias=None):
    return _LinearOfItsOwn.apply(hidden, weight, bias)


def linear_out_of_sight(hidden, weight, bias=None):
    """The mistake: the right values, and no gradient."""
    return _LinearOfItsOwn.apply(hidden.detach(), weight.detach(), bias)


@pytest.mark.parametrize("when", ["before attaching", "after attaching"])
def test_another_linear_function_keeps_the_gradients(qwen, monkeypatch, when):
    with torch.no_grad(), RouterReplay(qwen) as replay, replay.record() as recorded:
        qwen(batch())
    foreign = (recorded.routed_experts + 1) % replay.num_experts
    logits, grads, _ = replayed(qwen, "intercept", foreign)
    if when == "before attaching":
        monkeypatch.setattr(torch.nn.functional, "linear", linear_of_its_own)
    with RouterReplay(qwen, gating="op") as replay:
        assert all(isinstance(router, GatedRouter) for router in replay.routers)
        monkeypatch.setattr(torch.nn.functional, "linear", linear_of_its_own)
        qwen.zero_grad()
        with replay.replay(foreign):
            own = qwen(batch(), use_cache=False).logits
        own.float().log_softmax(-1)[..., 0].sum().backward()
    own_grads = torch.cat([p.grad.flatten().float() for p in qwen.parameters() if p.grad is not None])
    torch.testing.assert_close(own, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own_grads, grads, rtol=1e-3, atol=1e-4 * float(grads.abs().max()))


def test_a_product_without_its_gradient_is_not_the_routers(qwen, monkeypatch):
    """A check of values alone would take it, and the gate would learn nothing."""
    monkeypatch.setattr(
        GateFormula,
        "logits",
        lambda self, module, hidden: linear_out_of_sight(hidden.reshape(-1, hidden.shape[-1]), module.weight),
    )
    with pytest.raises(UnsupportedRouterError, match="does not cover its gate"):
        RouterReplay(qwen, gating="op")


class _Shaken(torch.nn.Module):
    """A router that does something else to its inputs in training."""

    def __init__(self, router):
        super().__init__()
        self.weight, self.top_k = router.weight, router.top_k

    def forward(self, hidden):
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if self.training:
            hidden = hidden * 1.5
        logits = torch.nn.functional.linear(hidden, self.weight)
        weights, ids = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True), ids


def test_a_router_that_differs_in_training_is_intercepted(qwen):
    for layer in (1, 3):
        qwen.model.layers[layer].mlp.gate = _Shaken(qwen.model.layers[layer].mlp.gate)
    with pytest.raises(UnsupportedRouterError, match="does not cover its gate"):
        RouterReplay(qwen, gating="op")
    RouterReplay(qwen, gating="intercept").remove()
