"""The forward of an enabled model takes a record, from a rollout or from the columns of a data set."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from engines.generating import WITH_ROUTES, full_forward, generate, mask_of
from misrouted import record_of
from model_zoo import build_tiny
from oracles import changed_rows, foreign_record, stacked
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from trl_r3 import disable_routing_replay, enable_routing_replay
from trl_r3.cli.experts import executed_ids


@pytest.fixture
def deepseek():
    """A dense layer, then two with experts: 2 of 8."""
    return build_tiny("deepseek_v3", first_k_dense_replace=1)


def with_dense_slots(routes, replay, fill):
    shape = (*routes.shape[:2], replay.num_decoder_layers, replay.top_k)
    full = torch.full(shape, fill, dtype=torch.int32)
    full[:, :, replay.moe_layers] = routes.int()
    return full


@pytest.mark.parametrize("fill", [0, -1, 7])
def test_dense_slots_say_nothing(deepseek, ids, fill):
    """Neither does a dense slot of -1 make its row missing, nor does one of 0 make a missing row whole."""
    routes = record_of(deepseek, ids)
    replay = enable_routing_replay(deepseek)
    loss = deepseek(ids, labels=ids, routed_experts=with_dense_slots(routes, replay, fill)).loss
    assert torch.equal(loss, deepseek(ids, labels=ids, routed_experts=routes).loss)
    routes[1, 4] = -1
    with pytest.raises(ValueError, match="sample 1: the row of position 4 is missing"):
        deepseek(ids, labels=ids, routed_experts=with_dense_slots(routes, replay, fill))


def test_a_prompt_row_matters_to_the_loss_of_the_completion(qwen, ids):
    routes = record_of(qwen, ids)
    enable_routing_replay(qwen)
    labels = ids.clone()
    labels[:, :6] = -100
    routes[1, 2] = -1
    with pytest.raises(ValueError, match="sample 1: the row of position 2 is missing"):
        qwen(ids, labels=labels, routed_experts=routes)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # as left padding has it
    routes[1, :3] = -1
    assert torch.isfinite(qwen(ids, attention_mask=mask, labels=labels, routed_experts=routes).loss)


def test_arguments_by_position_are_those_by_name(qwen, ids):
    routes = record_of(qwen, ids)
    enable_routing_replay(qwen)
    names = [*inspect.signature(type(qwen).forward).parameters][1:]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    routes[1, :3] = -1
    labels = ids.masked_fill(mask == 0, -100)
    assert torch.isfinite(qwen(ids, mask, labels=labels, routed_experts=routes).loss)
    routes[0, 4] = -1
    by_position = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    positional = [by_position.get(name) for name in names[: names.index("labels") + 1]]
    with pytest.raises(ValueError, match="sample 0: the row of position 4 is missing"):
        qwen(*positional, routed_experts=routes)


def test_packed_documents_end_with_a_missing_row(qwen, ids):
    """The last token of a document has no row, and no token of the next document attends to it."""
    routes = record_of(qwen, ids)
    enable_routing_replay(qwen)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None].expand_as(ids)
    labels = ids.clone()
    labels[:, 5] = -100  # nothing predicts the first token of the second document
    routes[:, 4] = -1
    assert torch.isfinite(qwen(ids, position_ids=positions, labels=labels, routed_experts=routes).loss)
    routes[0, 3] = -1
    with pytest.raises(ValueError, match="sample 0: the row of position 3 is missing"):
        qwen(ids, position_ids=positions, labels=labels, routed_experts=routes)


def test_expert_255_of_256_is_no_mark(ids):
    model = build_tiny("mixtral", num_local_experts=256)
    routes = record_of(model, ids)
    routes[0, 3, :, 0], routes[0, 3, :, 1] = 255, 0
    enable_routing_replay(model)
    losses = [
        model(ids, labels=ids, routed_experts=routes.to(d)).loss for d in (torch.uint8, torch.int16, torch.int64)
    ]
    assert losses[0] == losses[1] == losses[2]


def test_arrays_and_lists_are_records_too(qwen, ids):
    routes = record_of(qwen, ids)
    enable_routing_replay(qwen)
    expected = qwen(ids, routed_experts=routes).logits
    for form in (routes.numpy(), routes.numpy().astype(np.uint16), routes.tolist()):
        assert torch.equal(qwen(ids, routed_experts=form).logits, expected)


def test_a_constant_router_may_repeat_its_rows(qwen):
    """A gate of zeros selects the same experts for every token, and so may a part of a record: no error."""
    ids = torch.arange(1, 41).reshape(2, 20)
    varied = record_of(qwen, ids)
    with torch.no_grad():
        for layer in (1, 3):
            qwen.model.layers[layer].mlp.gate.weight.zero_()
    routes = record_of(qwen, ids)
    assert torch.equal(routes, routes[:, :1].expand_as(routes))
    enable_routing_replay(qwen)
    assert torch.isfinite(qwen(ids, labels=ids, routed_experts=routes).loss)
    varied[0, 4:16] = routes[0, :12]
    with executed_ids(qwen) as seen:
        qwen(ids, labels=ids, routed_experts=varied)
    assert torch.equal(stacked(seen, 2), varied.long())


def test_replaying_a_rollout(model, padded):
    """Own rollout, scored by weights that have moved: live routes differ, replayed ones do not."""
    ids, mask = padded
    enable_routing_replay(model)
    out = generate(model, ids, mask, **WITH_ROUTES)
    real = mask_of(out, mask)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    fed = (out.routed_experts != -1).all(-1).all(-1)
    live = full_forward(model, out.sequences, real)
    assert changed_rows(live, out.routed_experts)[fed].any()
    with executed_ids(model) as seen, torch.no_grad():
        model(out.sequences, attention_mask=real, routed_experts=out.routed_experts)
    assert not changed_rows(stacked(seen, 3), out.routed_experts)[fed].any()


def test_labels_may_only_count_recorded_rows(qwen, padded):
    """A missing row that the loss needs is an error; padding and the last token need none."""
    ids, mask = padded
    enable_routing_replay(qwen)
    out = generate(qwen, ids, mask, **WITH_ROUTES)
    real = mask_of(out, mask)
    labels = out.sequences.masked_fill(real == 0, -100)
    kwargs = {"attention_mask": real, "labels": labels}
    assert torch.isfinite(qwen(out.sequences, routed_experts=out.routed_experts, **kwargs).loss)
    lost = out.routed_experts.clone()
    lost[1, 9] = -1
    with pytest.raises(ValueError, match="sample 1: the row of position 9 is missing"):
        qwen(out.sequences, routed_experts=lost, **kwargs)
    labels[1, 10] = -100  # later predictions attend to it all the same
    with pytest.raises(ValueError, match="sample 1: the row of position 9 is missing"):
        qwen(out.sequences, routed_experts=lost, **kwargs)
    labels[1, 10:] = -100
    assert torch.isfinite(qwen(out.sequences, routed_experts=lost, **kwargs).loss)


def test_adapters_enable_the_model_inside(qwen, ids):
    peft_model = get_peft_model(qwen, LoraConfig(target_modules=["q_proj"]))
    record = foreign_record(enable_routing_replay(peft_model), *ids.shape)
    for model in (peft_model, qwen):
        with executed_ids(qwen) as seen:
            model(ids, routed_experts=record)
        assert torch.equal(stacked(seen, 2), record)
    disable_routing_replay(peft_model)
    assert "forward" not in vars(qwen) and "generate" not in vars(qwen)


@pytest.mark.parametrize("inner_first", [True, False])
def test_disable_sees_through_wrappers(qwen, inner_first):
    wrapped = get_peft_model(qwen, LoraConfig(target_modules=["q_proj"]))
    first, second = (qwen, wrapped) if inner_first else (wrapped, qwen)
    enable_routing_replay(first)
    disable_routing_replay(second)
    for model in (first, second):
        with pytest.raises(ValueError, match="no routing replay to disable"):
            disable_routing_replay(model)
    enable_routing_replay(second)
    disable_routing_replay(first)


@pytest.mark.parametrize(("gating", "shown"), [("intercept", "intercept"), ("op", "op")])
def test_how_the_gate_is_computed_can_be_chosen(qwen, ids, gating, shown):
    replay = enable_routing_replay(qwen, gating=gating)
    assert f"gating={shown!r}" in repr(replay)
    disable_routing_replay(qwen)
    with pytest.raises(ValueError, match="`gating` is 'fast', expected one of"):
        enable_routing_replay(qwen, gating="fast")


def columns(ids, routes):
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids), "routed_experts": routes}


@pytest.mark.parametrize("remove_unused_columns", [True, False])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_plain_trainer_replays_a_column(qwen, tmp_path, remove_unused_columns, wrapped):
    ids = torch.randint(2, 96, (4, 12), generator=torch.Generator().manual_seed(0))
    policy = get_peft_model(qwen, LoraConfig(target_modules=["q_proj"])) if wrapped else qwen
    replay = enable_routing_replay(policy)
    routes = torch.rand(4, 12, 2, replay.num_experts).argsort(-1)[..., : replay.top_k]
    settings = {
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "disable_tqdm": True,
    }
    trainer = Trainer(
        model=policy,
        args=TrainingArguments(
            str(tmp_path), save_strategy="no", remove_unused_columns=remove_unused_columns, **settings
        ),
        train_dataset=Dataset.from_dict({name: column.tolist() for name, column in columns(ids, routes).items()}),
    )
    with executed_ids(qwen) as seen:
        trainer.train()
    rows = {tuple(row) for row in routes.flatten(0, 2).tolist()}
    executed = [tuple(row) for ids in seen.values() for call in ids for row in call.tolist()]
    assert executed and set(executed) <= rows


def test_a_column_that_is_lost_on_the_way_is_told(qwen, ids):
    """TRL's SFTTrainer keeps the columns that it knows."""
    enable_routing_replay(qwen)
    with pytest.warns(RuntimeWarning, match="no `routed_experts` came with its labels") as told:
        qwen(ids, labels=ids)
    assert [each.filename for each in told if "labels" in str(each.message)] == [__file__]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        qwen(ids, labels=ids)
