"""Backward recomputes what was replayed, whatever happened since the forward."""

from __future__ import annotations

import threading

import pytest
import torch
from oracles import (
    CHECKPOINTING,
    as_sets,
    changed_rows,
    differing,
    foreign_record,
    gradients,
    stacked,
    use_checkpointing,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from trl_r3 import RouterReplay
from trl_r3.cli.experts import executed_ids

RECOMPUTING = CHECKPOINTING[1:]


def live_record(model, replay, ids):
    with torch.no_grad(), replay.record() as recorded:
        model(ids)
    return recorded.routed_experts


def replayed_loss(model, replay, record, ids):
    with replay.replay(record):
        return model(ids, labels=ids).loss


@pytest.fixture
def expected(model, ids):
    """Gradients without checkpointing: live, and with two foreign records."""
    model.train()
    model(ids, labels=ids).loss.backward()
    live = gradients(model)
    replay = RouterReplay(model)
    grads = [live]
    for seed in (1, 2):
        replayed_loss(model, replay, foreign_record(replay, *ids.shape, seed=seed), ids).backward()
        grads.append(gradients(model))
    replay.remove()
    assert all(len(differing(grads[a], grads[b], rtol=1e-3)) > len(live) / 2 for a, b in ((0, 1), (0, 2), (1, 2)))
    return grads


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_record_gives_the_same_bits(model, ids, kind, dtype):
    model.to(dtype)
    use_checkpointing(model, kind)
    out = model(ids, labels=ids)
    out.loss.backward()
    live = gradients(model)
    replay = RouterReplay(model)
    with replay.replay(live_record(model, replay, ids)):
        replayed = model(ids, labels=ids)
    replayed.loss.backward()
    assert torch.equal(replayed.logits, out.logits)
    assert differing(gradients(model), live) == []
    replayed_loss(model, replay, foreign_record(replay, *ids.shape), ids).backward()
    assert len(differing(gradients(model), live)) > len(live) / 2


@pytest.mark.parametrize("kind", RECOMPUTING)
def test_recompute_executes_the_record(model, ids, kind):
    use_checkpointing(model, kind)
    replay = RouterReplay(model)
    record = foreign_record(replay, *ids.shape)
    assert changed_rows(live_record(model, replay, ids), record).any()
    with executed_ids(model) as seen:
        replayed_loss(model, replay, record, ids).backward()
    assert {layer: len(calls) for layer, calls in seen.items()} == dict.fromkeys(replay.moe_layers, 2)
    for call in (0, 1):
        assert torch.equal(stacked(seen, 2, call), record)


@pytest.mark.parametrize("kind", RECOMPUTING)
def test_gradients_equal_those_without(model, ids, kind, expected):
    use_checkpointing(model, kind)
    replay = RouterReplay(model)
    replayed_loss(model, replay, foreign_record(replay, *ids.shape, seed=1), ids).backward()
    assert differing(gradients(model), expected[1]) == []


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("order", ["first first", "last first", "sum"])
def test_two_forwards_before_their_backwards(model, ids, kind, order, expected):
    use_checkpointing(model, kind)
    replay = RouterReplay(model)
    losses = [replayed_loss(model, replay, foreign_record(replay, *ids.shape, seed=seed), ids) for seed in (1, 2)]
    if order == "sum":
        sum(losses).backward()
        both = {name: expected[1][name] + expected[2][name] for name in expected[1]}
        assert differing(gradients(model), both, rtol=1e-5) == []
        return
    for i in (0, 1) if order == "first first" else (1, 0):
        losses[i].backward()
        assert differing(gradients(model), expected[i + 1]) == []


@pytest.mark.parametrize("kind", RECOMPUTING)
@pytest.mark.parametrize("between", ["live", "abandoned", "failed", "recorded", "reference"])
def test_what_happens_between_forward_and_backward(model, ids, kind, between, expected):
    """Each of these would take the record of a queue, or of an attribute on the router, away from the recompute."""
    use_checkpointing(model, kind)
    replay = RouterReplay(model)
    loss = replayed_loss(model, replay, foreign_record(replay, *ids.shape, seed=1), ids)
    if between == "live":
        model(ids, labels=ids).loss.backward()
        assert differing(gradients(model), expected[0]) == []
    elif between == "abandoned":
        replayed_loss(model, replay, foreign_record(replay, *ids.shape, seed=2), ids)
    elif between == "failed":
        with pytest.raises(ValueError, match="2 x 12 tokens"):
            replayed_loss(model, replay, foreign_record(replay, 2, 12), ids[:, 1:])
    elif between == "recorded":
        live_record(model, replay, ids)
    else:
        with torch.no_grad():
            model.eval()
            model(ids)
            model.train()
    loss.backward()
    assert differing(gradients(model), expected[1]) == []


@pytest.mark.parametrize("kind", RECOMPUTING)
def test_live_forward_before_the_first_replayed_one(model, ids, kind, expected):
    use_checkpointing(model, kind)
    replay = RouterReplay(model)
    live = model(ids, labels=ids).loss
    replayed = replayed_loss(model, replay, foreign_record(replay, *ids.shape, seed=1), ids)
    live.backward()
    assert differing(gradients(model), expected[0]) == []
    replayed.backward()
    assert differing(gradients(model), expected[1]) == []


@pytest.mark.parametrize("kind", RECOMPUTING)
def test_backward_on_another_thread(model, ids, kind, expected):
    """As autograd does for every accelerator."""
    use_checkpointing(model, kind)
    replay = RouterReplay(model)
    loss = replayed_loss(model, replay, foreign_record(replay, *ids.shape, seed=1), ids)
    worker = threading.Thread(target=loss.backward)
    worker.start()
    worker.join()
    assert differing(gradients(model), expected[1]) == []


@pytest.mark.parametrize("kind", RECOMPUTING)
def test_backward_inside_the_context(model, ids, kind, expected):
    use_checkpointing(model, kind)
    replay = RouterReplay(model)
    with replay.replay(foreign_record(replay, *ids.shape, seed=1)):
        model(ids, labels=ids).loss.backward()
    assert differing(gradients(model), expected[1]) == []


@pytest.mark.parametrize("kind", RECOMPUTING)
def test_removal_before_backward_is_no_wrong_gradient(model, ids, kind, expected):
    """Either the record is still replayed, or somebody says that it is not."""
    use_checkpointing(model, kind)
    replay = RouterReplay(model)
    loss = replayed_loss(model, replay, foreign_record(replay, *ids.shape, seed=1), ids)
    replay.remove()
    try:
        loss.backward()
    except RuntimeError as error:
        assert "removed" in str(error)
    else:
        assert differing(gradients(model), expected[1]) == []


@pytest.mark.parametrize("kind", RECOMPUTING)
def test_recording_forward_recomputes_its_own_selection(model, ids, kind):
    """R2 records a forward, which may be differentiated; its recompute must not select anew."""
    use_checkpointing(model, kind)
    replay = RouterReplay(model)
    with executed_ids(model) as seen, replay.record() as recorded:
        loss = model(ids, labels=ids).loss
    record = recorded.routed_experts
    for name, p in model.named_parameters():
        if name.endswith("gate.weight"):  # so that a live recompute would select otherwise
            p.data = torch.randn_like(p)
    with executed_ids(model) as again:
        loss.backward(retain_graph=True)
        loss.backward()
    assert torch.equal(as_sets(stacked(seen, 2)), as_sets(record))
    assert all(torch.equal(as_sets(stacked(again, 2, call)), as_sets(record)) for call in (0, 1))
    assert changed_rows(live_record(model, replay, ids), record).any()


def decide_closely(model):
    """Let experts be nearly equal, and what reaches the routers noisy: no two calls select the same."""
    for layer in model.model.layers:
        if (gate := getattr(layer.mlp, "gate", None)) is not None:
            draws = torch.Generator().manual_seed(0)
            with torch.no_grad():
                gate.weight[2:] = gate.weight[:2].repeat(len(gate.weight) // 2 - 1, 1)
                gate.weight += 1e-6 * torch.randn(gate.weight.shape, generator=draws)
            gate.register_forward_pre_hook(
                lambda gate, args, draws=draws: args[0] + 1e-2 * torch.randn(args[0].shape, generator=draws)
            )


@pytest.mark.parametrize("kind", RECOMPUTING)
@pytest.mark.parametrize("gating", ["intercept", "op"])
def test_recompute_repeats_what_missing_rows_selected(model, ids, kind, gating):
    replay = RouterReplay(model, gating)
    record = foreign_record(replay, *ids.shape)
    record[:, 3:] = -1
    decide_closely(model)
    use_checkpointing(model, kind)
    with executed_ids(model) as seen:
        loss = replayed_loss(model, replay, record, ids)
        loss.backward()
        replayed_loss(model, replay, record, ids)
    forward, recompute, another = (stacked(seen, ids.shape[0], call) for call in range(3))
    assert changed_rows(forward, another).any(), "the case itself"
    assert torch.equal(forward, recompute)
    assert torch.equal(forward[:, :3], record[:, :3])


@pytest.mark.parametrize("kind", RECOMPUTING)
def test_wrapper_of_torch_distributed(model, ids, kind, expected):
    """FSDP's `activation_checkpointing` wraps each layer in a module instead."""
    layer = type(model.model.layers[0])
    impl = CheckpointImpl.REENTRANT if kind == "reentrant" else CheckpointImpl.NO_REENTRANT
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda module: checkpoint_wrapper(module, checkpoint_impl=impl),
        check_fn=lambda module: isinstance(module, layer),
    )
    replay = RouterReplay(model)
    record = foreign_record(replay, *ids.shape, seed=1)
    with executed_ids(model) as seen:
        replayed_loss(model, replay, record, ids).backward()
    assert all(len(calls) == 2 for calls in seen.values())
    assert torch.equal(stacked(seen, 2, 0), record) and torch.equal(stacked(seen, 2, 1), record)
    if kind == "non-reentrant":  # gradients of the other one are off without replay, too
        grads = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in gradients(model).items()}
        assert differing(grads, expected[1]) == []


def test_unknown_checkpoint_is_an_error(qwen, ids):
    """A checkpoint that replay cannot tie its record to would recompute live."""
    replay = RouterReplay(qwen)
    layer = qwen.model.layers[1]
    own = layer.forward
    layer.forward = lambda hidden, **kwargs: checkpoint(lambda h: own(h, **kwargs), hidden, use_reentrant=True)
    loss = replayed_loss(qwen, replay, foreign_record(replay, *ids.shape), ids)
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.gate is recomputed in backward .* does not know"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("steady", [False, True])
def test_a_checkpoint_around_the_whole_model_never_recomputes_live(qwen, ids, reentrant, steady):
    """It runs again what called the model: its record is there only if `replay()` still is."""
    replay = RouterReplay(qwen)
    record = foreign_record(replay, *ids.shape)
    embeds = qwen.get_input_embeddings()(ids).detach().requires_grad_()

    def whole():
        return checkpoint(lambda hidden: qwen(inputs_embeds=hidden).logits, embeds, use_reentrant=reentrant).sum()

    with executed_ids(qwen) as seen, replay.replay(record):
        whole().backward()
    assert all(torch.equal(stacked(seen, ids.shape[0], call), record) for call in (0, 1))
    replay.remove()
    replay = RouterReplay(qwen)
    replay.steady_recompute = steady
    if steady:
        loss = whole()
    else:
        with replay.replay(record):
            loss = whole()
    with pytest.raises(RuntimeError, match=r"Qwen3MoeModel is recomputed in backward .* inside `replay\(\)`"):
        loss.backward()


class ClosesWithTheForward:
    """The classic mistake: the record sits on the router while the forward runs, and is gone in backward."""

    def __init__(self, model, record):
        self.gates = {layer: model.model.layers[layer].mlp.gate for layer in record}
        self.record = record

    def __enter__(self):
        for layer, gate in self.gates.items():
            gate.forward = lambda hidden, gate=gate, layer=layer: self.select(gate, hidden, self.record[layer])

    def __exit__(self, *error):
        for gate in self.gates.values():
            del gate.forward

    @staticmethod
    def select(gate, hidden, chosen):
        logits = torch.nn.functional.linear(hidden, gate.weight)
        weights = logits.softmax(-1).gather(-1, chosen)
        return logits, weights / weights.sum(-1, keepdim=True), chosen


@pytest.mark.parametrize("kind", ["none", "reentrant"])
def test_record_dropped_before_backward_is_told_apart(model, ids, kind, expected):
    """The mistake is right without checkpointing, and with the reentrant kind wrong without any error."""
    use_checkpointing(model, kind)
    replay = RouterReplay(model)
    record = foreign_record(replay, *ids.shape, seed=1)
    layers = replay.moe_layers
    replay.remove()
    with ClosesWithTheForward(model, {layer: record[:, :, slot].flatten(0, 1) for slot, layer in enumerate(layers)}):
        loss = model(ids, labels=ids).loss
    loss.backward()
    wrong = differing(gradients(model), expected[1], rtol=0.01)
    assert (wrong != []) == (kind == "reentrant")
