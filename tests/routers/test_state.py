"""A handle that is given back leaves nothing, and what it cannot replay it refuses (properties 10, 15 and 17)."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re

import pytest
import torch
from model_zoo import build_tiny
from oracles import changed_rows, differing, foreign_record, gradients, stacked, use_checkpointing
from peft import LoraConfig, get_peft_model
from torch.nn.modules import module as torch_module
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.models.bert.modeling_bert import BertLMHeadModel

from trl_r3 import RouterReplay, UnsupportedRouterError, disable_routing_replay, enable_routing_replay
from trl_r3.cli.experts import executed_ids
from trl_r3.routers.patches import Patch


def traces(model):
    """Everything that a handle could leave: attributes, hooks, modes, weights and the state of the generator."""
    attributes = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            plain = isinstance(value, (bool, int, float, str, type(None)))
            attributes[name, key] = value if plain else len(value) if isinstance(value, dict) else id(value)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(getattr(torch_module, name)) for name in dir(torch_module) if re.fullmatch(r"_global_.*hooks", name)]
    return attributes, tensors, hooks, torch.get_rng_state()


def same_traces(one, other):
    return one[0] == other[0] and differing(one[1], other[1]) == [] and one[2] == other[2] and one[3].equal(other[3])


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


class Stop(Exception):
    pass


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


def test_refused_record_leaves_no_state(qwen, ids):
    live = qwen(ids).logits
    replay = enable_routing_replay(qwen)
    record = foreign_record(replay, *ids.shape)
    bad = record.clone()
    bad[1, 3, 0] = 8
    for wrong in (bad, record[..., :1], record[:, :, :1], record[:1], record.double(), record[0]):
        with pytest.raises(ValueError):
            qwen(ids, routed_experts=wrong)
        with pytest.raises(ValueError), replay.replay(wrong):
            qwen(ids)
        assert torch.equal(qwen(ids).logits, live)


def test_bad_records_are_refused_before_any_forward(qwen, ids):
    replay = RouterReplay(qwen)
    good = foreign_record(replay, *ids.shape)
    fed = []
    qwen.model.layers[0].register_forward_hook(lambda *args: fed.append(1))

    def refused(record, *words):
        with pytest.raises(ValueError) as error, replay.replay(record):
            qwen(ids)
        for word in words:
            assert word in str(error.value)

    def damaged(sample, row, slot, value):
        record = good.clone()
        record[sample, row, slot] = torch.tensor(value)
        return record

    refused(damaged(1, 5, 1, [0, 8]), "sample 1", "decoder layer 3", "row 5", "8")
    refused(damaged(0, 2, 0, [-2, 1]), "sample 0", "decoder layer 1", "row 2", "-2", "8")
    refused(damaged(1, 4, 1, [6, 6]), "sample 1", "decoder layer 3", "row 4", "expert 6", "2 ids")
    refused(damaged(1, 7, 1, [0, 0]), "sample 1", "decoder layer 3", "row 7")
    refused(damaged(1, 7, 1, [-1, -1]), "sample 1", "decoder layer 3", "row 7", "2 of 4")
    refused(damaged(1, 7, 1, [-1, 3]), "sample 1", "row 7", "1 of 4")
    refused(good[:, :-1], "2 x 11", "2 x 12")
    refused(torch.cat([good, good[:, :1]], 1), "2 x 13", "2 x 12")
    refused(good[:1], "1 x 12", "2 x 12")
    refused(good[:, :, :1], "1 layer slots", "2 MoE layers", "4 decoder layers")
    refused(good[:, :, [0, 1, 0]], "3 layer slots", "2 MoE layers", "4 decoder layers")
    refused(good[..., [0, 1, 0]], "(2, 12, 2, 3)", "2 experts")
    refused(good.float(), "torch.float32")
    refused(good.bool(), "torch.bool")
    refused(good[0], "3 dimensions", "4")
    all_missing = good.clone()
    all_missing[1] = -1
    refused(all_missing, "sample 1", "12 rows")
    assert not fed


# Property 17: a router that did not fire exactly once


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


def test_record_that_nobody_takes_is_an_error(qwen, ids):
    """Transformers passes on any keyword, so that a record would be ignored, and the forward be live."""
    replay = RouterReplay(qwen)
    with pytest.raises((RuntimeError, TypeError, ValueError), match="routed_experts"):
        qwen(ids, routed_experts=foreign_record(replay, *ids.shape))
    assert torch.isfinite(qwen(ids).logits).all()


def test_adapters_enable_the_model_inside(qwen, ids):
    peft_model = get_peft_model(qwen, LoraConfig(target_modules=["q_proj"]))
    record = foreign_record(enable_routing_replay(peft_model), *ids.shape)
    for model in (peft_model, qwen):
        with executed_ids(qwen) as seen:
            model(ids, routed_experts=record)
        assert torch.equal(stacked(seen, 2), record)
    disable_routing_replay(peft_model)
    assert "forward" not in vars(qwen) and "generate" not in vars(qwen)


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


# What cannot be attached


def test_attaching_twice_is_refused(qwen, ids):
    replay = RouterReplay(qwen)
    with pytest.raises(ValueError, match="already"):
        enable_routing_replay(qwen)
    with replay.replay(record := foreign_record(replay, *ids.shape)), executed_ids(qwen) as seen:
        qwen(ids)
    assert torch.equal(stacked(seen, 2), record)
    replay.remove()
    RouterReplay(qwen).remove()


def tiny_llama():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    )


def tiny_t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4))


def tiny_bert():
    return BertLMHeadModel(
        BertConfig(
            vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
            is_decoder=True,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (tiny_llama, "LlamaForCausalLM is a dense model"),
        (tiny_bert, "BertLMHeadModel is a dense model"),
        (tiny_t5, "T5ForConditionalGeneration is an encoder-decoder"),
    ],
)
def test_model_without_routers_is_refused(build, words):
    model = build()
    before = traces(model)
    with pytest.raises(UnsupportedRouterError, match=words):
        enable_routing_replay(model)
    assert same_traces(traces(model), before)


def test_compiled_model_is_refused(qwen):
    with pytest.raises(ValueError, match="compiled"):
        RouterReplay(torch.compile(qwen))
    qwen.compile()
    with pytest.raises(ValueError, match="compiled"):
        RouterReplay(qwen)


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


@pytest.mark.parametrize("hook", ["forward", "pre-forward"])
def test_failing_probe_leaves_nothing(qwen, ids, hook):
    def stop(*args):
        raise Stop

    before = traces(qwen)
    layer = qwen.model.layers[1]
    handle = layer.register_forward_hook(stop) if hook == "forward" else layer.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        RouterReplay(qwen)
    handle.remove()
    assert same_traces(traces(qwen), before)


def test_meta_weights_are_refused():
    with torch.device("meta"):
        model = type(build_tiny("mixtral"))(build_tiny("mixtral").config)
    with pytest.raises(UnsupportedRouterError, match="meta"):
        RouterReplay(model)


def test_repr_and_description(qwen):
    replay = RouterReplay(qwen)
    assert (replay.moe_layers, replay.num_decoder_layers, replay.num_experts, replay.top_k) == ([1, 3], 4, 8, 2)
    assert "moe_layers=[1, 3]" in repr(replay) and "Qwen3MoeTopKRouter" in repr(replay)
