"""A handle records and replays one model, tells how far live routing differs, and refuses what it would lose."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from misrouted import record_of
from model_zoo import build_tiny
from oracles import changed_rows, foreign_record, stacked
from routers.left_behind import same_traces, traces

from trl_r3 import RouterReplay, disable_routing_replay, enable_routing_replay
from trl_r3.cli.experts import executed_ids

# A router that did not fire exactly once


def fused(qwen):
    """A block that computes its mixture without calling its router, as a kernel does."""
    block = qwen.model.layers[3].mlp

    def forward(hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        values, chosen = (flat @ block.gate.weight.T).softmax(-1).topk(2)
        return block.experts(flat, chosen, values).reshape(hidden.shape)

    block.forward = forward


def called_twice(qwen):
    block = qwen.model.layers[3].mlp
    own = block.forward

    def forward(hidden):
        own(hidden)
        return own(hidden)

    block.forward = forward


def replaced(qwen):
    qwen.model.layers[3].mlp.gate = copy.deepcopy(build_tiny("qwen3_moe").model.layers[1].mlp.gate)


def forward_replaced(qwen):
    gate = qwen.model.layers[3].mlp.gate
    gate.forward = lambda hidden: type(gate).forward(gate, hidden)


def layer_dropped(qwen):
    qwen.model.layers[3].forward = lambda hidden, **kwargs: hidden


@pytest.mark.parametrize("way", ["replay", "record"])
@pytest.mark.parametrize(
    ("change", "fired"),
    [(fused, 0), (called_twice, 2), (replaced, 0), (forward_replaced, 0), (layer_dropped, 0)],
)
def test_router_that_did_not_fire_once_is_an_error(qwen, ids, way, change, fired):
    replay = RouterReplay(qwen)
    record = foreign_record(replay, *ids.shape)
    with replay.replay(record):
        qwen(ids)
    change(qwen)
    qwen(ids)  # live forwards are none of our business
    with (
        pytest.raises(RuntimeError, match=rf"layers\.3\.mlp\.gate .* ran {fired} times in a forward, expected 1"),
        replay.record() if way == "record" else replay.replay(record),
    ):
        qwen(ids)


def test_selection_that_changed_is_an_error(qwen, ids):
    """The router still fires, but selects another number of experts, or by no top-k any more."""
    replay = RouterReplay(qwen)
    record = foreign_record(replay, *ids.shape)
    gate = qwen.model.layers[3].mlp.gate
    gate.top_k = 3
    message = r"layers\.3\.mlp\.gate selects 3 of 8 experts, but selected 2 of 8"
    with pytest.raises(RuntimeError, match=message), replay.replay(record):
        qwen(ids)
    gate.top_k = 2
    with replay.replay(record):
        qwen(ids)


def test_context_without_a_forward_is_an_error(qwen, ids):
    replay, other = RouterReplay(qwen), build_tiny("qwen3_moe")
    record = foreign_record(replay, *ids.shape)
    with pytest.raises(RuntimeError, match="no forward went through the model"), replay.replay(record):
        other(ids)
    with replay.record() as recorded:
        other(ids)
    with pytest.raises(RuntimeError, match="no forward ran"):
        recorded.routed_experts  # noqa: B018


def test_contexts_do_not_nest(qwen, ids):
    replay = RouterReplay(qwen)
    record = foreign_record(replay, *ids.shape)
    with replay.record():
        with pytest.raises(RuntimeError, match=r"`replay\(\)` inside `record\(\)`"), replay.replay(record):
            pass
        qwen(ids)
    with replay.replay(record):
        with pytest.raises(RuntimeError, match=r"`record\(\)` inside `replay\(\)`"), replay.record():
            pass
        qwen(ids)


def test_removed_handle_is_an_error(qwen, ids):
    replay = RouterReplay(qwen)
    record = foreign_record(replay, *ids.shape)
    replay.remove()
    replay.remove()
    for context in (replay.record, lambda: replay.replay(record)):
        with pytest.raises(RuntimeError, match="removed"), context():
            qwen(ids)
    with pytest.raises(ValueError, match="no routing replay to disable"):
        disable_routing_replay(qwen)


# A second model


def test_second_model_is_never_touched(qwen, ids):
    """A reference or reward model of the same class, called while the first one replays."""
    second = copy.deepcopy(qwen)
    before, live = traces(second), second(ids).logits
    replay = RouterReplay(qwen)
    record = foreign_record(replay, *ids.shape)
    with executed_ids(second) as seen, replay.replay(record) as stats:
        replayed = qwen(ids).logits
        assert torch.equal(second(ids).logits, live)
    assert not torch.equal(replayed, live)
    assert changed_rows(stacked(seen, 2), record).any()
    assert stats.forwards == 1
    assert same_traces(traces(second), before)


def test_two_handles_replay_their_own_records(qwen, ids):
    second = copy.deepcopy(qwen)
    first_replay, second_replay = RouterReplay(qwen), RouterReplay(second)
    first, other = (foreign_record(first_replay, *ids.shape, seed=seed) for seed in (1, 2))
    with (
        executed_ids(qwen) as seen,
        executed_ids(second) as seen_second,
        first_replay.replay(first),
        second_replay.replay(other),
    ):
        second(ids)
        qwen(ids)
    assert torch.equal(stacked(seen, 2), first)
    assert torch.equal(stacked(seen_second, 2), other)


def test_record_that_nobody_takes_is_an_error(qwen, ids):
    """Transformers passes on any keyword, so that a record would be ignored, and the forward be live."""
    replay = RouterReplay(qwen)
    with pytest.raises((RuntimeError, TypeError, ValueError), match="routed_experts"):
        qwen(ids, routed_experts=foreign_record(replay, *ids.shape))
    assert torch.isfinite(qwen(ids).logits).all()


def test_weights_save_and_load_while_attached(qwen, ids):
    keys = list(qwen.state_dict())
    live = qwen(ids).logits
    enable_routing_replay(qwen)
    assert list(qwen.state_dict()) == keys
    with io.BytesIO() as file:
        torch.save(qwen.state_dict(), file)
        file.seek(0)
        other = build_tiny("qwen3_moe", seed=1, num_hidden_layers=4, mlp_only_layers=[0, 2], norm_topk_prob=True)
        assert not torch.equal(other(ids).logits, live)
        other.load_state_dict(torch.load(file))
    assert torch.equal(other(ids).logits, live)


def test_repr_and_description(qwen):
    replay = RouterReplay(qwen)
    assert (replay.moe_layers, replay.num_decoder_layers, replay.num_experts, replay.top_k) == ([1, 3], 4, 8, 2)
    assert "moe_layers=[1, 3]" in repr(replay) and "Qwen3MoeTopKRouter" in repr(replay)


def test_padding_is_not_compared(qwen, padded):
    """A row of a masked token may be recorded, as it is in a truncated completion; it says nothing about drift."""
    ids, mask = padded
    routes = record_of(qwen, ids)
    foreign = torch.where(mask[:, :, None, None] == 0, (routes + 1) % 8, 0).to(routes.dtype)
    with torch.no_grad():
        replay = RouterReplay(qwen)
        with replay.record() as masked:
            qwen(ids, attention_mask=mask)
        record = torch.where(mask[:, :, None, None] == 0, foreign, masked.routed_experts)
        with replay.replay(record) as stats:
            qwen(ids, attention_mask=mask)
        with replay.replay(record) as unmasked:
            qwen(ids)
    assert int(stats.changed_routers) == int(stats.changed_tokens) == 0
    assert int(stats.compared_tokens) == int(mask.sum()) < int(stats.recorded_tokens) == ids.numel()
    assert int(unmasked.changed_routers) > 0


def test_compiling_an_attached_model_is_an_error_that_says_so(qwen, ids):
    with RouterReplay(qwen) as replay, torch.no_grad(), replay.record() as recorded:
        qwen(ids)
    replay = RouterReplay(qwen)
    qwen.compile(backend="eager")
    expected = pytest.raises(RuntimeError, match="was compiled after routing replay was attached")
    with expected, replay.replay(recorded.routed_experts):
        qwen(ids)


@pytest.mark.parametrize("first", ["compiled", "attached"])
def test_layers_that_are_compiled_replay(qwen, ids, first):
    """As Accelerate compiles regions: each layer by itself, before or after."""
    torch.compiler.reset()
    if first == "attached":
        replay = RouterReplay(qwen, padding="auto")
    for layer in qwen.model.layers:
        layer.compile(backend="eager")
    if first == "compiled":
        replay = RouterReplay(qwen, padding="auto")
    with replay:  # what is compiled outlives the model, and its handle with it
        record = foreign_record(replay, *ids.shape)
        with replay.replay(record), executed_ids(qwen) as seen:
            qwen(ids)
        assert torch.equal(stacked(seen, ids.shape[0]), record)
        assert replay.padding.why is None


@pytest.mark.parametrize("gating", ["intercept", "op"])
def test_attaching_in_inference_mode(qwen, ids, gating):
    with torch.inference_mode():
        replay = RouterReplay(qwen, gating, padding="auto")
    assert replay.padding.why is None
    with replay:
        with replay.replay(foreign_record(replay, *ids.shape)):
            loss = qwen(ids, labels=ids).loss
        loss.backward()
    assert all(router.module.weight.grad.abs().sum() > 0 for router in replay.routers)
