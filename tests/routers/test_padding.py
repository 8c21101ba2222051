"""Replay over real tokens only: loss, gradients and experts are those of the padded batch, or it stays padded."""

from __future__ import annotations

import pytest
import torch
from engines.tiny_chat import tiny_qwen3_moe
from model_zoo import build_tiny
from oracles import CHECKPOINTING, as_sets, foreign_record, give_forward, gradients, use_checkpointing
from supported_models import listed_types
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_r3 import RouterReplay, disable_routing_replay, enable_routing_replay
from trl_r3.cli.experts import executed_ids, experts_of
from trl_r3.routers.packing import PackedBatch

# prompts padded on the left, completions on the right; one without padding
MASK = torch.tensor([[0] * 5 + [1] * 7, [1] * 9 + [0] * 3, [0, 0] + [1] * 8 + [0, 0], [1] * 12])
IDS = (torch.arange(48).reshape(4, 12) * 7 + 3) % 100 + 10
SCORED = (MASK == 1) & (MASK.roll(1, 1) == 1) & (torch.arange(12) > 0)  # what a real token predicts


def loss_of(model, mask=MASK, **kwargs):
    labels = IDS.masked_fill(~SCORED, -100)
    given = {"attention_mask": mask, "use_cache": False, "output_router_logits": True, **kwargs}
    return model(input_ids=IDS, labels=labels, **given)


def trained(padding, gating="intercept", checkpointing="none", model=None, record=None, **kwargs):
    """What a replayed update did."""
    model = model or tiny_qwen3_moe()
    use_checkpointing(model, checkpointing)
    with RouterReplay(model, gating, padding) as replay:
        if record is None:
            record = foreign_record(replay, 4, 12)
        with executed_ids(model) as seen, replay.replay(record) as stats:
            output = loss_of(model, **kwargs)
            output.loss.backward()
        counts = {name: float(getattr(stats, name)) for name in ("changed_routers", "compared_tokens")}
        why = "not asked to" if replay.padding is None else replay.padding.why
    return output, gradients(model), seen, record, counts, why


def assert_same(one, other):
    assert one.loss.item() == pytest.approx(other.loss.item(), rel=1e-6)
    assert one.aux_loss.item() == pytest.approx(other.aux_loss.item(), rel=1e-6)
    for a, b in zip(one.router_logits, other.router_logits, strict=True):
        real = MASK.flatten().bool()
        torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-5)
        assert a.shape == b.shape


def assert_same_gradients(one, other, of_largest=1e-5):
    assert one.keys() == other.keys()
    for name in one:
        scale = other[name].abs().max()
        assert (one[name] - other[name]).abs().max() <= of_largest * scale + 1e-8, name


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("gating", ["intercept", "op"])
def test_an_update_is_that_of_the_padded_batch(gating, checkpointing):
    padded, expected, rows, record, counted, why = trained("keep", gating, checkpointing)
    assert why == "not asked to" and {len(ids) for calls in rows.values() for ids in calls} == {48}
    packed, found, seen, _, counts, why = trained("auto", gating, checkpointing)
    assert why is None
    assert_same(packed, padded)
    assert_same_gradients(found, expected)
    assert counts == counted and counts["changed_routers"] > 0.9 * counts["compared_tokens"] * 3  # routes of nobody
    real = as_sets(record)[MASK.bool()]
    for calls in (torch.stack(each, 1) for each in zip(*seen.values(), strict=True)):  # the recompute, too
        assert calls.shape[0] == int(MASK.sum()), "experts saw padding"
        assert torch.equal(as_sets(calls), real)
    assert len(seen[0]) == (1 if checkpointing == "none" else 2)


def test_missing_rows_route_live_and_are_never_padding():
    with RouterReplay(tiny_qwen3_moe()) as replay:
        record = foreign_record(replay, 4, 12)
    record[0, 6:9] = -1
    padded, expected, *_, counted, _ = trained("keep", record=record)
    packed, found, *_, counts, why = trained("auto", record=record)
    assert why is None and counts == counted
    assert_same(packed, padded)
    assert_same_gradients(found, expected)


def holes(mask):
    mask = mask.clone()
    mask[3, 4] = 0
    return mask


WHOLE = {
    "a hole in a sequence": {"mask": holes(MASK)},
    "no padding": {"mask": torch.ones_like(MASK)},
    "nothing but padding": {"mask": torch.zeros_like(MASK)},
    "no mask": {"mask": None},
    "a mask for each pair": {"mask": torch.ones(4, 1, 12, 12).tril().bool(), "output_router_logits": False},
}


@pytest.mark.parametrize("kwargs", WHOLE.values(), ids=WHOLE)
def test_where_there_is_nothing_to_skip_every_bit_is_that_of_the_padded_batch(kwargs, caplog):
    padded, expected, *_ = trained("keep", **kwargs)
    model = tiny_qwen3_moe()
    rows = rows_of_experts(model)
    packed, found, *_ = trained("auto", model=model, **kwargs)
    assert {48} <= rows <= {18, 39, 23, 48}  # those of attaching
    torch.testing.assert_close(packed.loss, padded.loss, rtol=0, atol=0, equal_nan=True)  # of no token at all
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    said = [record.getMessage() for record in caplog.records]
    holes = "padding is kept in a forward: its attention mask has holes"
    assert said == ([holes] if kwargs["mask"] is not None and kwargs["mask"].sum() == MASK.sum() - 1 else [])


class Operators(TorchDispatchMode):
    """Counts what PyTorch is asked to do."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operators(padding, layers, mask):
    model = tiny_qwen3_moe(num_hidden_layers=layers)
    with RouterReplay(model, padding=padding) as replay:
        record = foreign_record(replay, 4, 12)
        with Operators() as counted, replay.replay(record):
            loss_of(model, mask).loss.backward()
    return counted.count


def test_without_padding_it_costs_nothing_in_any_layer():
    """What a mask is read for is asked once, however many layers there are."""
    whole = torch.ones_like(MASK)
    beyond = [operators("auto", layers, whole) - operators("keep", layers, whole) for layers in (2, 4)]
    assert beyond[0] == beyond[1] <= 30
    assert operators("auto", 4, MASK) != operators("keep", 4, MASK)  # or nothing is counted of what is skipped


BY_EXPERTS_ONLY = {
    "hidden states": ({"output_hidden_states": True}, "is asked for output_hidden_states"),
    "attentions": ({"output_attentions": True}, "is asked for output_attentions"),
    "a cache": ({"use_cache": True}, "is asked for use_cache"),
}


@pytest.mark.parametrize(("kwargs", "text"), BY_EXPERTS_ONLY.values(), ids=BY_EXPERTS_ONLY)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_what_cannot_be_packed_skips_by_experts_and_says_so_once(kwargs, text, checkpointing, caplog):
    if checkpointing != "none" and "use_cache" in kwargs:
        pytest.skip("Transformers uses no cache then")
    padded, expected, *_ = trained("keep", checkpointing=checkpointing, **kwargs)
    model = tiny_qwen3_moe()
    rows = rows_of_experts(model)
    for name, value in padded.items():  # what was asked for is there
        assert value is not None, name
    packed, found, *_ = trained("auto", checkpointing=checkpointing, model=model, **kwargs)
    assert int(MASK.sum()) in rows and 48 not in rows
    assert [*packed] == [*padded]
    assert packed.loss.item() == pytest.approx(padded.loss.item(), rel=1e-6)
    assert_same_gradients(found, expected)
    (record,) = caplog.records
    assert text in record.getMessage()
    assert packed.get("hidden_states") is None or packed.hidden_states[1].shape[:2] == (4, 12)


def test_embeddings_are_packed():
    """As of a model that mixes images in, or whose user edits them."""
    found = {}
    for padding in ("keep", "auto"):
        model = tiny_qwen3_moe()
        rows = rows_of_experts(model)
        embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
        with RouterReplay(model, padding=padding) as replay:
            rows.clear()
            with replay.replay(foreign_record(replay, 4, 12)):
                logits = model(inputs_embeds=embeds, attention_mask=MASK, use_cache=False).logits
            logits[MASK.bool()].square().mean().backward()
        found[padding] = logits[MASK.bool()], gradients(model) | {"embeds": embeds.grad[MASK.bool()]}, rows
    assert found["keep"][2] == {48} and found["auto"][2] == {int(MASK.sum())}
    torch.testing.assert_close(found["auto"][0], found["keep"][0], rtol=1e-4, atol=1e-5)
    assert_same_gradients(found["auto"][1], found["keep"][1])


def test_a_cache_that_only_the_config_wants_is_not_made():
    """It would hold one sequence of all."""
    model = tiny_qwen3_moe()
    assert model.config.use_cache
    with RouterReplay(model, padding="auto") as replay, replay.replay(foreign_record(replay, 4, 12)):
        for called in (model, model.model):  # whose own module asks for none, nor for not one
            output = called(input_ids=IDS, attention_mask=MASK)
            assert output.past_key_values is None or output.past_key_values.get_seq_length() == 12


def test_hidden_states_that_only_the_config_wants_are_those_of_the_batch():
    model = tiny_qwen3_moe()
    with RouterReplay(model, padding="auto") as replay:
        model.config.output_hidden_states = True
        with replay.replay(foreign_record(replay, 4, 12)):
            output = model(input_ids=IDS, attention_mask=MASK)
        assert {states.shape[:2] for states in output.hidden_states} == {(4, 12)}


def test_a_tuple_is_not_packed():
    found = []
    for padding in ("keep", "auto"):
        model = tiny_qwen3_moe()
        with RouterReplay(model, padding=padding) as replay, replay.replay(foreign_record(replay, 4, 12)):
            found.append(model.model(input_ids=IDS, attention_mask=MASK, use_cache=False, return_dict=False)[0])
    torch.testing.assert_close(*(hidden[MASK.bool()] for hidden in found), rtol=1e-4, atol=1e-5)


def test_a_row_without_a_real_token():
    """As TRL makes them of completions that were cut, with a prompt of nothing."""
    mask = MASK.clone()
    mask[1] = 0
    padded, _, _, record, *_ = trained("keep", mask=mask)
    packed, _, seen, *_ = trained("auto", mask=mask)
    assert {len(ids) for calls in seen.values() for ids in calls} == {int(mask.sum())}
    real = mask.bool()
    torch.testing.assert_close(packed.logits[real], padded.logits[real], rtol=1e-4, atol=1e-5)


def test_positions_of_ones_own():
    """Those of a padded batch that counts real tokens only, as `generate` does."""
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    padded, expected, *_ = trained("keep", position_ids=positions)
    packed, found, seen, *_ = trained("auto", position_ids=positions)
    assert {len(ids) for calls in seen.values() for ids in calls} == {int(MASK.sum())}
    assert_same(packed, padded)
    assert_same_gradients(found, expected)


# Which models allow it


def rows_of_experts(model):
    """How many rows the experts compute in each call, inside of whatever is put around them later."""
    rows = set()

    def forward(own, hidden, *args, **kwargs):
        rows.add(hidden.flatten(0, -2).shape[0])
        return own(hidden, *args, **kwargs)

    for module in experts_of(model).values():
        give_forward(module, forward)
    return rows


SKIPPED = listed_types("skipped")
BY_EXPERTS = listed_types("skipped by experts only: .*")


def test_the_page_names_families_of_both_kinds():
    assert len(SKIPPED) > 20 and len(BY_EXPERTS) > 30


@pytest.mark.parametrize("family", [*SKIPPED, *BY_EXPERTS])
def test_families_that_skip(family):
    """Each that the page of supported models names: an update through experts of nobody, without padding and with."""
    found = {}
    for padding in ("keep", "auto"):
        model = build_tiny(family).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        rows = rows_of_experts(model)
        with RouterReplay(model, padding=padding) as replay:
            rows.clear()  # of attaching
            with replay.replay(foreign_record(replay, 4, 12)):
                labels = IDS.masked_fill(~SCORED, -100)
                loss = model(input_ids=IDS, attention_mask=MASK, labels=labels, use_cache=False).loss
            loss.backward()
        found[padding] = loss.item(), gradients(model), rows
    assert found["keep"][2] == {48} and found["auto"][2] == {int(MASK.sum())}
    assert found["auto"][0] == pytest.approx(found["keep"][0], rel=1e-5)
    assert_same_gradients(found["auto"][1], found["keep"][1], 1e-4)


KEPT = {"llama4_text": "a mask of its own", "deepseek_v4": "'eager'"}


@pytest.mark.parametrize(("family", "text"), KEPT.items())
def test_families_that_keep_padding(family, text):
    own, model = ALL_ATTENTION_FUNCTIONS["sdpa"], build_tiny(family)
    with RouterReplay(model, padding="auto") as replay:
        assert text in replay.padding.why and f"padding=kept: {replay.padding.why}" in repr(replay)
        assert "; and without it in its experts, " in replay.padding.why
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
        assert not any("forward" in vars(module) for module in experts_of(model).values())


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("gating", ["intercept", "op"])
def test_by_experts_only_it_is_the_update_of_the_padded_batch(gating, checkpointing):
    found = {}
    for padding in ("keep", "auto"):
        model = tiny_qwen3_moe()
        model.config._attn_implementation = "eager"
        rows = rows_of_experts(model)
        found[padding] = (*trained(padding, gating, checkpointing, model), rows)
    padded, expected, seen, record, counted, _, _ = found["keep"]
    packed, grads, ids, _, counts, why, rows = found["auto"]
    assert "'eager'" in why and int(MASK.sum()) in rows and 48 not in rows
    assert_same(packed, padded)
    assert_same_gradients(grads, expected)
    assert counts == counted and counts["changed_routers"] > 0.9 * counts["compared_tokens"] * 3
    for calls in zip(*ids.values(), strict=True):  # what arrives, in the recompute, too
        executed = torch.stack(calls, 1).unflatten(0, (4, 12))
        assert torch.equal(as_sets(executed)[MASK.bool()], as_sets(record)[MASK.bool()])


def test_a_window_that_is_wider_than_the_check():
    """Its few tokens would not show it."""
    model = build_tiny("mixtral", sliding_window=4096)
    with RouterReplay(model, padding="auto") as replay:
        assert "a `sliding_window`" in replay.padding.why or "a mask of its own" in replay.padding.why


def test_attention_across_sequences_is_found(monkeypatch):
    """The wrong variant: real tokens in one row, as one sequence."""
    of = PackedBatch.of.__func__

    def as_one(cls, real_BT):
        batch = of(cls, real_BT)
        batch.lengths = [sum(batch.lengths)]
        return batch

    monkeypatch.setattr(PackedBatch, "of", classmethod(as_one))
    with RouterReplay(tiny_qwen3_moe(), padding="auto") as replay:
        assert "packed and padded logits differ (by" in replay.padding.why


def test_attention_that_goes_another_way_later_is_an_error():
    model, before = tiny_qwen3_moe(), ALL_ATTENTION_FUNCTIONS["sdpa"]
    with RouterReplay(model, padding="auto") as replay:
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
        record = foreign_record(replay, 4, 12)
        model.config._attn_implementation = "eager"
        text = "attention ran 0 times in a packed forward, expected 4"
        with pytest.raises(RuntimeError, match=text), replay.replay(record):
            loss_of(model)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


# Transformers is given back


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_handles_in_any_order(order):
    registries = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    own = [registry["sdpa"] for registry in registries]
    models = [tiny_qwen3_moe(), tiny_qwen3_moe()]
    handles = [RouterReplay(model, padding="auto") for model in models]
    assert all(registry["sdpa"] is not each for registry, each in zip(registries, own, strict=True))
    first, second = order
    handles[first].remove()
    with handles[second].replay(foreign_record(handles[second], 4, 12)), executed_ids(models[second]) as seen:
        loss_of(models[second])
    assert {len(ids) for calls in seen.values() for ids in calls} == {int(MASK.sum())}
    live = models[first](input_ids=IDS, attention_mask=MASK).logits
    handles[second].remove()
    assert torch.equal(models[first](input_ids=IDS, attention_mask=MASK).logits, live)
    with torch.no_grad():
        assert registries[0]["sdpa"](*_attention()) is not None
    assert [registry["sdpa"] for registry in registries] == own


def _attention():
    module = tiny_qwen3_moe().model.layers[0].self_attn
    heads = module.config.num_attention_heads, module.config.num_key_value_heads
    query, key, value = (torch.randn(1, n, 5, 16) for n in (heads[0], heads[1], heads[1]))
    return module, query, key, value, None


@pytest.mark.parametrize(("attention", "mode"), [("sdpa", "all"), ("eager", "experts")])
def test_a_handle_that_was_removed_says_what_it_did(attention, mode):
    model = tiny_qwen3_moe()
    model.config._attn_implementation = attention
    with RouterReplay(model, padding="auto") as replay:
        said = repr(replay)
    assert repr(replay) == said and replay.padding.mode == mode
    assert "padding=skipped" in said


def test_a_setting_that_does_not_exist():
    with pytest.raises(ValueError, match=r"`padding` is 'trim', expected one of \('keep', 'auto'\)"):
        RouterReplay(tiny_qwen3_moe(), padding="trim")


def test_a_loop_of_ones_own():
    model = tiny_qwen3_moe()
    replay = enable_routing_replay(model, padding="auto")
    record = foreign_record(replay, 4, 12)
    with executed_ids(model) as seen:
        loss_of(model, routed_experts=record).loss.backward()
    assert {len(ids) for calls in seen.values() for ids in calls} == {int(MASK.sum())}
    disable_routing_replay(model)


@pytest.mark.parametrize("gating", ["intercept", "op"])
def test_another_default_device(gating, padded):
    """As `torch.set_default_device("cuda")` in a notebook: what is made on the host stays there."""
    ids, mask = padded
    model = build_tiny("qwen3_moe", norm_topk_prob=True)
    row, positions = ids.reshape(1, -1), torch.arange(ids.shape[1]).repeat(len(ids))[None]
    records, outputs = None, []
    for device in ("cpu", "meta"):
        torch.set_default_device(device)
        try:
            with RouterReplay(model, gating, padding="auto") as replay:
                if records is None:
                    records = [foreign_record(replay, *size.shape) for size in (ids, row)]
                with torch.no_grad(), replay.replay(records[0]):
                    outputs.append(model(input_ids=ids, attention_mask=mask).logits)
                with torch.no_grad(), replay.replay(records[1]):
                    outputs.append(model(input_ids=row, position_ids=positions).logits)
                assert str(replay.padding) == "skipped"
        finally:
            torch.set_default_device(None)
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
