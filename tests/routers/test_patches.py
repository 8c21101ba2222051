"""What is put into a model is taken out again, bit for bit, and does not come along with a copy."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from model_zoo import build_tiny
from oracles import changed_rows, differing, foreign_record, gradients, stacked, use_checkpointing
from peft import LoraConfig, get_peft_model
from routers.left_behind import Stop, same_traces, traces

from trl_r3 import RouterReplay, disable_routing_replay, enable_routing_replay
from trl_r3.cli.experts import executed_ids
from trl_r3.routers.patches import Patch, attended_tokens, get_batch


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v4", "dbrx", "llama4_text"])
@pytest.mark.parametrize("training", [True, False])
def test_attach_and_remove_leave_nothing(model_type, training):
    model = build_tiny(model_type).train(training)
    model.get_submodule("model.layers.0" if model_type != "dbrx" else "transformer.blocks.0").train(not training)
    before = traces(model)
    replay = RouterReplay(model)
    attached = traces(model)
    assert not same_traces(attached, before)
    assert attached[0].keys() - before[0].keys() == {key for key in attached[0] if key[1] == "forward"}
    replay.remove()
    assert same_traces(traces(model), before)
    enable_routing_replay(model)
    disable_routing_replay(model)
    assert same_traces(traces(model), before)


@pytest.mark.parametrize("kind", ["none", "non-reentrant", "reentrant"])
def test_no_state_after_a_step(model, ids, kind):
    """Forward, gradients and optimizer step, after replay and after removal, equal those of a model never touched."""
    untouched = copy.deepcopy(model)
    use_checkpointing(untouched, kind)
    use_checkpointing(model, kind)

    def live():
        for one in (model, untouched):
            one(ids, labels=ids).loss.backward()
        assert torch.equal(model(ids).logits, untouched(ids).logits)
        assert differing(gradients(model), gradients(untouched)) == []

    replay = RouterReplay(model)
    live()
    with replay.replay(foreign_record(replay, *ids.shape)):
        out = model(ids, labels=ids)
    out.loss.backward()
    assert len(differing(gradients(model), grads_of(untouched, ids))) > 10
    live()
    with replay.record():
        model(ids)
    live()
    replay.remove()
    live()


def grads_of(model, ids):
    model(ids, labels=ids).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("where", ["decoder layer", "router", "user code", "backward"])
@pytest.mark.parametrize("way", ["replay", "record", "surface"])
def test_no_state_after_an_exception(model, ids, where, way):
    live = model(ids).logits
    replay = enable_routing_replay(model)
    record = foreign_record(replay, *ids.shape)

    def stop(*args):
        raise Stop

    last = model.model.layers[replay.moe_layers[-1]]
    target = last.mlp.gate if where == "router" else last
    register = target.register_full_backward_hook if where == "backward" else target.register_forward_hook
    handle = register(stop) if where != "user code" else None

    def run(**kwargs):
        loss = model(ids, labels=ids, **kwargs).loss
        if where == "user code":
            raise Stop
        loss.backward()

    with pytest.raises(Stop):
        if way == "surface":
            run(routed_experts=record)
        else:
            with replay.record() if way == "record" else replay.replay(record):
                run()
    if handle is not None:
        handle.remove()
    model.zero_grad(set_to_none=True)
    assert torch.equal(model(ids).logits, live)
    with executed_ids(model) as seen:
        assert not torch.equal(model(ids, routed_experts=record).logits, live)
    assert torch.equal(stacked(seen, 2), record), "the handle still works"
    disable_routing_replay(model)
    assert torch.equal(model(ids).logits, live)


@pytest.mark.parametrize("enable", [RouterReplay, enable_routing_replay])
def test_deepcopied_model_is_independent(qwen, ids, enable):
    """A copy of an attached model runs its own modules, whatever the original does."""
    live = qwen(ids).logits
    replay = enable(qwen)
    record = foreign_record(replay, *ids.shape)
    copied = copy.deepcopy(qwen)
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(1.5)
    moved = copied(ids).logits
    assert not torch.equal(moved, live)
    with executed_ids(copied) as seen, replay.replay(record):
        replayed = qwen(ids).logits
        assert torch.equal(copied(ids).logits, moved)
    assert changed_rows(stacked(seen, 2), record).any()
    assert not torch.equal(replayed, live)
    replay.remove() if enable is RouterReplay else disable_routing_replay(qwen)
    assert torch.equal(qwen(ids).logits, live)
    assert torch.equal(copied(ids).logits, moved)
    assert not any(isinstance(vars(module).get("forward"), Patch) for module in copied.modules())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_is_a_plain_model(qwen, ids, copier):
    """As an average of the weights, or the best model so far, is made while the policy trains."""
    live = qwen(ids).logits
    replay = enable_routing_replay(qwen)
    record = foreign_record(replay, *ids.shape)
    with replay.record():
        copied = copier(qwen)
    assert torch.equal(copied(ids).logits, live)
    with pytest.raises(ValueError, match="no routing replay to disable"):
        disable_routing_replay(copied)
    enable_routing_replay(copied)
    for model in (copied, qwen):
        with executed_ids(model) as seen:
            model(ids, routed_experts=record)
        assert torch.equal(stacked(seen, 2), record)
    disable_routing_replay(copied)
    assert torch.equal(copied(ids).logits, live)
    with executed_ids(qwen) as seen:
        qwen(ids, routed_experts=record)
    assert torch.equal(stacked(seen, 2), record)


@pytest.mark.parametrize("wrapped", [False, True])
def test_signature_shows_the_record(qwen, ids, wrapped):
    """`Trainer` drops the columns that the signature of the forward lacks."""
    own = inspect.signature(qwen.forward)
    assert "routed_experts" not in own.parameters
    enable_routing_replay(get_peft_model(qwen, LoraConfig(target_modules=["q_proj"])) if wrapped else qwen)
    shown = inspect.signature(qwen.forward)
    assert [name for name in shown.parameters if name != "routed_experts"] == list(own.parameters)
    assert shown.parameters["routed_experts"].default is None
    disable_routing_replay(qwen)
    assert inspect.signature(qwen.forward) == own


IDS = torch.zeros(2, 6, dtype=torch.int64)
MASK = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])


def test_the_batch_of_a_forward():
    embeds = torch.zeros(2, 6, 4)
    ids, main = get_batch((), {"input_ids": None, "inputs_embeds": embeds})
    assert ids is None and main is embeds
    assert get_batch((IDS,), {}) == (IDS, IDS)
    with pytest.raises(RuntimeError, match="neither `input_ids` nor `inputs_embeds`"):
        get_batch((), {"position_ids": IDS})


def test_a_mask_that_says_which_tokens_are_real():
    assert attended_tokens(MASK, 2, 6).tolist() == MASK.bool().flatten().tolist()
    assert attended_tokens(MASK[:, :5], 2, 6) is None and attended_tokens(None, 2, 6) is None
