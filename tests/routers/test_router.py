"""One replayed layer is the definition, whatever implements it, and nothing else moves."""

from __future__ import annotations

import copy

import pytest
import torch
from model_zoo import build_tiny
from oracles import InDouble, changed_rows, differing, foreign_record, gradients, stacked
from routers.blocks import Watched, blocks_of, in_float64, record_of

from trl_r3 import RouterReplay
from trl_r3.cli.experts import executed_ids

# The definition: weights of token x for the experts `chosen`, in plain float64


def softmax_renormalised(gate, x, chosen):
    exponentials = torch.exp(gate.weight @ x)
    return exponentials[chosen] / exponentials[chosen].sum()


def softmax_over_all(gate, x, chosen):
    exponentials = torch.exp(gate.weight @ x)
    return exponentials[chosen] / exponentials.sum()


def sigmoid_scaled(gate, x, chosen):
    scores = 1 / (1 + torch.exp(-(gate.weight @ x)))
    return gate.routed_scaling_factor * scores[chosen] / scores[chosen].sum()


def softmax_over_chosen(gate, x, chosen):
    exponentials = torch.exp(gate.weight @ x + gate.bias)
    return exponentials[chosen] / exponentials[chosen].sum()


def gated_expert(experts, e, x):
    gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
    return experts.down_proj[e] @ (gate / (1 + torch.exp(-gate)) * up)


def gpt_oss_expert(experts, e, x):
    both = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
    gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
    return ((up + 1) * gate / (1 + torch.exp(-1.702 * gate))) @ experts.down_proj[e] + experts.down_proj_bias[e]


def shared_expert(mlp, x):
    gate, up = mlp.gate_proj.weight @ x, mlp.up_proj.weight @ x
    return mlp.down_proj.weight @ (gate / (1 + torch.exp(-gate)) * up)


DEFINITIONS = {
    "qwen3_moe": softmax_renormalised,
    "mixtral": softmax_renormalised,
    "deepseek_v3": sigmoid_scaled,
    "olmoe": softmax_over_all,
    "gpt_oss": softmax_over_chosen,
}


def naive_block(block, x_NH, ids_NK, weigh):
    """`y = sum_i g_i E_i(x)`, one token and one expert after the other."""
    gate = block.router if hasattr(block, "router") else block.gate
    expert = gpt_oss_expert if hasattr(block.experts, "down_proj_bias") else gated_expert
    out_NH = torch.zeros_like(x_NH)
    for n, x in enumerate(x_NH):
        for e, weight in zip(ids_NK[n].tolist(), weigh(gate, x, ids_NK[n]), strict=True):
            out_NH[n] += weight * expert(block.experts, e, x)
        if hasattr(block, "shared_experts"):
            out_NH[n] += shared_expert(block.shared_experts, x)
    return out_NH


def replayed_blocks(model_type, ids, seed=0):
    """A float64 model of this type, after a forward with a foreign record: blocks, what they saw, and the record."""
    model = in_float64(model_type)
    replay = RouterReplay(model)
    blocks = blocks_of(model)
    watched = Watched(blocks)
    record = foreign_record(replay, *ids.shape, seed=seed)
    with torch.no_grad(), InDouble():
        assert changed_rows(record_of(model, replay, ids), record).double().mean() > 0.5
        with replay.replay(record):
            model(ids)
    return blocks, watched, record.flatten(0, 1)


@pytest.mark.parametrize("model_type", DEFINITIONS)
@torch.no_grad()
def test_block_is_the_definition(model_type, ids):
    blocks, watched, record_NLK = replayed_blocks(model_type, ids)
    for slot, (layer, block) in enumerate(blocks.items()):
        expected = naive_block(block, watched.inputs[layer], record_NLK[:, slot], DEFINITIONS[model_type])
        assert expected.abs().max() > 1e-3
        assert (watched.outputs[layer] - expected).abs().max() < 1e-12


def only_live(weigh):
    """Gather from probabilities that are already zero outside the live top-k."""

    def weighed(gate, x, chosen):
        logits = gate.weight @ x + getattr(gate, "bias", 0)
        live = logits.topk(chosen.shape[0]).indices
        weights = weigh(gate, x, chosen) * torch.isin(chosen, live)
        return weights / weights.sum().clamp(min=1e-20)

    return weighed


def of_another_model(weigh):
    """The weights of the rollout: the same ids, weighed by a router with other weights."""

    def weighed(gate, x, chosen):
        rollout = copy.deepcopy(gate)
        rollout.weight.mul_(1.01)
        return weigh(rollout, x, chosen)

    return weighed


WRONG = [
    ("qwen3_moe", "not renormalised", softmax_over_all),
    ("mixtral", "not renormalised", softmax_over_all),
    ("olmoe", "renormalised", softmax_renormalised),
    ("deepseek_v3", "softmax for sigmoid", softmax_renormalised),
    ("gpt_oss", "softmax over all", lambda gate, x, chosen: torch.softmax(gate.weight @ x + gate.bias, -1)[chosen]),
    *[(family, "only live", only_live(weigh)) for family, weigh in DEFINITIONS.items() if family != "deepseek_v3"],
    *[(family, "weights of the rollout", of_another_model(weigh)) for family, weigh in DEFINITIONS.items()],
]


@pytest.mark.parametrize(("model_type", "mistake", "weigh"), WRONG, ids=[f"{f}-{m}" for f, m, _ in WRONG])
@torch.no_grad()
def test_wrong_weights_are_told_apart(model_type, mistake, weigh, ids):
    blocks, watched, record_NLK = replayed_blocks(model_type, ids)
    for slot, (layer, block) in enumerate(blocks.items()):
        wrong = naive_block(block, watched.inputs[layer], record_NLK[:, slot], weigh)
        assert (watched.outputs[layer] - wrong).abs().max() > 1e-6, mistake


@torch.no_grad()
def test_order_of_ids_changes_nothing(ids):
    model = in_float64("qwen3_moe", num_experts_per_tok=4)
    replay = RouterReplay(model)
    record = foreign_record(replay, *ids.shape)
    with InDouble():
        live = model(ids).logits
        with replay.replay(record):
            expected = model(ids).logits
        with replay.replay(record[..., [2, 0, 3, 1]]):
            permuted = model(ids).logits
    assert (live - expected).abs().max() > 1e-3
    assert (permuted - expected).abs().max() < 1e-12


@torch.no_grad()
def test_shared_experts_and_dense_layers_are_untouched(ids):
    model = build_tiny("deepseek_v3")  # layer 0 is dense
    replay = RouterReplay(model)
    assert replay.moe_layers == [1, 2]
    first = model.model.layers[1].mlp
    watched = Watched({"dense": model.model.layers[0], "shared": first.shared_experts, "block": first})
    model(ids)
    live = dict(watched.outputs)
    with replay.replay(foreign_record(replay, *ids.shape)):
        model(ids)
    assert not torch.equal(watched.outputs["block"], live["block"])
    assert torch.equal(watched.outputs["dense"], live["dense"])
    assert torch.equal(watched.outputs["shared"], live["shared"])


# Own record; the same harness shows that another record gives other bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_record_is_bit_identical(model, ids, dtype):
    model.to(dtype).train()
    before = model(ids, labels=ids)
    before.loss.backward()
    live = gradients(model)
    replay = RouterReplay(model)

    def replayed(record):
        with replay.replay(record) as stats:
            out = model(ids, labels=ids)
        out.loss.backward()
        return out.logits, gradients(model), int(stats.changed_routers)

    own = record_of(model, replay, ids)
    logits, grads, changed = replayed(own)
    assert torch.equal(logits, before.logits) and differing(grads, live) == [] and changed == 0
    logits, grads, changed = replayed(foreign_record(replay, *ids.shape))
    assert not torch.equal(logits, before.logits) and len(differing(grads, live)) > len(live) / 2 and changed > 0


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@torch.no_grad()
def test_implementations_of_experts(model, ids, implementation):
    model.set_experts_implementation(implementation)
    live = model(ids).logits
    replay = RouterReplay(model)
    with replay.replay(record_of(model, replay, ids)):
        assert torch.equal(model(ids).logits, live)
    record = foreign_record(replay, *ids.shape)
    with executed_ids(model) as seen, replay.replay(record):
        assert not torch.equal(model(ids).logits, live)
    assert torch.equal(stacked(seen, 2), record)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("layout", ["MoE layers", "decoder layers"])
@torch.no_grad()
def test_layouts_and_dtypes(qwen, ids, dtype, layout):
    replay = RouterReplay(qwen)
    record = foreign_record(replay, *ids.shape)
    given = record
    if layout == "decoder layers":  # slots of dense layers hold whatever the engine left there
        given = torch.full((*ids.shape, replay.num_decoder_layers, replay.top_k), 99)
        given[:, :, replay.moe_layers] = record
    with executed_ids(qwen) as live:
        qwen(ids)
    assert changed_rows(stacked(live, 2), record).any()
    with executed_ids(qwen) as seen, replay.replay(given.to(dtype)):
        qwen(ids)
    assert torch.equal(stacked(seen, 2), record)


@torch.no_grad()
def test_slots_are_not_read_by_order(qwen, ids):
    """A record with one slot per decoder layer, read by the ordinal of the MoE layer, shifts every layer."""
    replay = RouterReplay(qwen)
    every_layer = torch.zeros((*ids.shape, replay.num_decoder_layers, replay.top_k), dtype=torch.long)
    every_layer[:, :, replay.moe_layers] = foreign_record(replay, *ids.shape)
    with executed_ids(qwen) as seen, replay.replay(every_layer):
        qwen(ids)
    by_ordinal = every_layer[:, :, : len(replay.moe_layers)]
    assert replay.moe_layers == [1, 3]
    assert (changed_rows(stacked(seen, 2), by_ordinal).double().mean((0, 1)) > 0.5).all()
    assert torch.equal(stacked(seen, 2), every_layer[:, :, [1, 3]])


@torch.no_grad()
def test_missing_rows_route_live(model, ids):
    replay = RouterReplay(model)
    with executed_ids(model) as seen:
        live_logits = model(ids).logits
    live, record = stacked(seen, 2), foreign_record(replay, *ids.shape)
    assert changed_rows(live, record).any()
    record[:, 5:] = -1
    with executed_ids(model) as seen, replay.replay(record) as stats:
        out = model(ids, output_router_logits=True)
    executed = stacked(seen, 2)
    would_pick = torch.stack([logits.topk(2).indices for logits in out.router_logits], 1).unflatten(0, ids.shape)
    assert torch.equal(executed[:, :5], record[:, :5])
    assert torch.equal(executed[:, 5:], would_pick[:, 5:])
    assert torch.equal(executed[:, 5:, 0], live[:, 5:, 0]), "nothing was replayed before the first MoE layer"
    assert int(stats.recorded_tokens) == 2 * 5
    assert not torch.equal(out.logits[:, :5], live_logits[:, :5])


@torch.no_grad()
def test_missing_is_not_expert_zero(qwen, ids):
    """Padding a missing row with zeros, or with arange(K), executes experts that the router would not."""
    replay = RouterReplay(qwen)
    record = record_of(qwen, replay, ids)
    expected = qwen(ids).logits
    missing = record.clone()
    missing[:, -4:] = -1
    with executed_ids(qwen) as seen, replay.replay(missing):
        assert torch.equal(qwen(ids).logits, expected)
    assert torch.equal(stacked(seen, 2), record.long())
    balanced = record.clone()
    balanced[:, -4:] = torch.arange(2)
    with replay.replay(balanced):
        assert not torch.equal(qwen(ids).logits, expected)


@torch.no_grad()
def test_changed_counts_are_those_of_the_live_logits(model, ids):
    """The health signal, from the router logits that the model itself returns."""
    replay = RouterReplay(model)
    record = record_of(model, replay, ids)
    record[:, ::2] = foreign_record(replay, *ids.shape)[:, ::2].to(record)
    record[0, -1] = -1
    with replay.replay(record) as stats:
        out = model(ids, output_router_logits=True)
    live = torch.stack([logits.topk(2).indices for logits in out.router_logits], 1).unflatten(0, ids.shape)
    changed = changed_rows(live, record) & (record[..., 0, 0] != -1)[..., None]
    assert changed.any() and not changed.all()
    assert int(stats.changed_routers) == int(changed.sum())
    assert int(stats.changed_tokens) == int(changed.any(-1).sum())
    assert int(stats.recorded_tokens) == ids.numel() - 1
    assert stats.forwards == 1


@pytest.mark.parametrize("gating", ["intercept", "op"])
def test_a_gate_that_selects_fewer_experts_than_it_did_is_refused(gating):
    from engines.tiny_chat import tiny_qwen3_moe

    model = tiny_qwen3_moe()
    ids = torch.arange(10, 22)[None]
    with RouterReplay(model, gating) as replay:
        layer = model.model.layers[replay.moe_layers[-1]]
        before = layer.mlp.gate.top_k
        layer.mlp.gate.top_k = before - 1
        for grad in (torch.no_grad, torch.enable_grad):
            text = f"selects {before - 1} of .* but selected {before} of"
            with pytest.raises(RuntimeError, match=text), replay.record(), grad():
                model(ids)


@pytest.mark.parametrize("way", ["replay", "record"])
def test_a_router_of_the_text_alone_is_told(way, ids):
    """ERNIE routes tokens of images by other routers, beside those of text."""
    model = build_tiny("ernie4_5_vl_moe")
    replay = RouterReplay(model)
    kinds = torch.zeros_like(ids)
    kinds[:, 3:5] = 1
    embeds = model.get_input_embeddings()(ids)
    inside = replay.record() if way == "record" else replay.replay(foreign_record(replay, *ids.shape))
    what = "routes 20 tokens in a forward over 24, .* text alone"
    with torch.no_grad(), pytest.raises(RuntimeError, match=what), inside:
        replay.stack(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), moe_mm_token_type_ids=kinds)


def test_a_router_of_some_tokens_is_told_by_the_op(qwen, ids):
    replay = RouterReplay(qwen, gating="op")
    replay.routers[0].module.register_forward_pre_hook(lambda module, args: (args[0][:-2],))
    inside = replay.replay(foreign_record(replay, *ids.shape))
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.gate routes 22 tokens in a forward over 24"), inside:
        qwen(ids)
