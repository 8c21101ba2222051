"""The record in memory: storage loses nothing, layers go by index, and each row lands at its token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from records.drawn import EXPERTS, records

from trl_r3 import RoutingLayout
from trl_r3.records.checks import check_rows
from trl_r3.records.record import align, missing_rows, pack, select_moe_layers, to_record, unpack

SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]


def fits(dtype, ids):
    info = torch.iinfo(dtype)
    return ids.numel() == 0 or (info.min <= ids.min() and ids.max() <= info.max)


@given(records(), st.sampled_from(SIGNED + UNSIGNED))
def test_storage_round_trip(drawn, dtype):
    layout, ids = drawn
    if not fits(dtype, ids):
        dtype = torch.int64
    stored = pack(ids.to(dtype), layout)
    assert stored.dtype == (torch.uint8 if layout.num_experts <= 255 else torch.int16)
    assert stored.element_size() * stored.numel() == ids.numel() * (1 if layout.num_experts <= 255 else 2)
    assert torch.equal(unpack(stored, layout).long(), ids)
    assert unpack(stored, layout).dtype == torch.int16
    assert torch.equal(missing_rows(stored, layout), (ids == -1).all(-1).all(-1))
    assert torch.equal(pack(stored, layout), stored)
    assert torch.equal(pack(unpack(stored, layout), layout), stored)
    check_rows(stored, layout)


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_last_expert_and_missing_are_kept_apart(num_experts):
    layout = RoutingLayout((0,), 1, num_experts, 1)
    ids = torch.tensor([num_experts - 1, 0, -1, num_experts - 2]).reshape(4, 1, 1)
    stored = pack(ids, layout)
    assert unpack(stored, layout).flatten().tolist() == [num_experts - 1, 0, -1, num_experts - 2]
    assert missing_rows(stored, layout).tolist() == [False, False, True, False]
    narrow = ids.to(torch.uint8)  # the mistake: one byte whatever the number of experts
    kept = torch.equal(narrow.long().where(narrow != 255, -1), ids)
    assert kept == (num_experts <= 255)


def test_missing_in_bytes():
    """Engines that store bytes mark a missing row by 255, which is an expert from 256 on."""
    few, many = (RoutingLayout((0,), 1, num_experts, 1) for num_experts in (255, 256))
    stored = torch.tensor([255, 7], dtype=torch.uint8).reshape(2, 1, 1)
    assert unpack(pack(stored, few), few).flatten().tolist() == [-1, 7]
    assert unpack(pack(stored, many), many).flatten().tolist() == [255, 7]


@given(records(min_rows=1, missing=False), st.sampled_from([torch.int16, torch.int32, torch.int64]), st.data())
def test_ids_outside_are_refused(drawn, dtype, data):
    layout, ids = drawn
    row, slot, k = (data.draw(st.integers(0, size - 1)) for size in ids.shape)
    wrong = data.draw(
        st.one_of(st.integers(-(2**15), -2), st.integers(layout.num_experts, 2**15 - 1), st.just(layout.num_experts))
    )
    ids = ids.to(dtype)
    ids[row, slot, k] = wrong
    place = rf"sample 3, decoder layer {layout.moe_layers[slot]} \(MoE layer {slot}\), row {row}: expert id {wrong} is"
    with pytest.raises(ValueError, match=rf"{place} outside \[0, {layout.num_experts}\)"):
        pack(ids, layout, sample=3)
    batch = torch.stack([ids.clone().fill_(0), ids])
    with pytest.raises(ValueError, match=place.replace("sample 3", "sample 1")):
        pack(batch, layout)


def test_ids_that_wrapped_around_are_named():
    """`torch.int8` holds neither 150 nor 200: what it made of one is outside, and no other id is."""
    layout = RoutingLayout((0,), 1, num_experts=200, top_k=2)
    ids = torch.tensor([[[3, 83]], [[5, 150]]]).to(torch.int8)
    with pytest.raises(ValueError, match=r"sample 4, .* row 1: expert id -106 is outside \[0, 200\)"):
        pack(ids, layout, sample=4)


# Layers by index, never by order


@given(records(min_rows=1))
def test_both_layouts_are_understood(drawn):
    layout, ids = drawn
    every_layer = torch.full((ids.shape[0], layout.num_decoder_layers, layout.top_k), 999)
    for slot, layer in enumerate(layout.moe_layers):
        every_layer[:, layer] = ids[:, slot]
    assert torch.equal(select_moe_layers(every_layer, layout), ids)
    assert torch.equal(select_moe_layers(ids, layout), ids)
    by_ordinal = every_layer[:, : len(layout.moe_layers)]  # the mistake
    dense_before = layout.moe_layers != tuple(range(len(layout.moe_layers)))
    assert torch.equal(by_ordinal, ids) == (not dense_before)


@given(records(min_rows=1), st.integers(0, 9))
def test_other_layouts_are_refused(drawn, slots):
    layout, ids = drawn
    if slots in (len(layout.moe_layers), layout.num_decoder_layers):
        slots = layout.num_decoder_layers + 1
    record = torch.zeros(ids.shape[0], slots, layout.top_k, dtype=torch.long)
    words = (
        rf"{slots} layer slots.* {len(layout.moe_layers)} MoE layers and {layout.num_decoder_layers} decoder layers"
    )
    with pytest.raises(ValueError, match=words):
        select_moe_layers(record, layout)
    with pytest.raises(ValueError, match=rf"last dimension must be {layout.top_k}"):
        select_moe_layers(torch.cat([ids, ids[..., :1]], -1), layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.complex128])
def test_ids_are_integers(dtype):
    layout = RoutingLayout((0,), 1, 8, 2)
    with pytest.raises(ValueError, match=f"{dtype}, but expert ids are integers"):
        select_moe_layers(torch.zeros(3, 1, 2, dtype=dtype), layout)


def test_rows_of_draft_layers_never_enter_a_record():
    """An engine that drafts with layers of its own (MTP) would return their routers behind those of the decoder."""
    layout = RoutingLayout((1, 2, 3), 4, 16, 2)
    rows = torch.arange(5 * 4 * 2).reshape(5, 4, 2) % 16
    own = select_moe_layers(rows, layout)
    assert torch.equal(own, rows[:, 1:])
    drafted = torch.cat([rows, rows[:, :1]], dim=1)
    with pytest.raises(ValueError, match="`routed_experts` has 5 layer slots, but the model has 3 MoE layers and 4"):
        select_moe_layers(drafted, layout)


# Padding


@settings(max_examples=50)
@given(st.data())
def test_alignment_of_padded_batches(data):
    """Every row lands at its token, and every other position is missing: never expert 0, nor anything else."""
    num_experts = data.draw(st.sampled_from([8, 256]))
    layout = RoutingLayout((0, 2), 3, num_experts, 2)
    prompts = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    completions = [data.draw(st.integers(1, 6)) for _ in prompts]
    prompt_width = max(prompts) + data.draw(st.integers(0, 3))
    width = prompt_width + max(completions) + data.draw(st.integers(0, 3))
    # a row tells its sample and its position
    rows = [
        torch.tensor([[[i % 8, (i + 1 + r % 7) % 8]] * 2 for r in range(p + c - 1)])
        for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
    ]
    batch = align([pack(record, layout) for record in rows], prompts, prompt_width, width, layout)
    assert batch.shape == (len(prompts), width, 2, 2) and batch.dtype == layout.storage_dtype
    aligned = unpack(batch, layout).long()
    for i, record in enumerate(rows):
        start = prompt_width - prompts[i]
        for position in range(width):
            row = position - start
            expected = record[row] if 0 <= row < len(record) else torch.full((2, 2), -1)
            assert torch.equal(aligned[i, position], expected)


@pytest.mark.parametrize(("prompt_width", "width"), [(3, 9), (4, 8)])
def test_alignment_that_does_not_fit_is_refused(prompt_width, width):
    layout = RoutingLayout((0,), 1, 8, 2)
    fitting, long = torch.zeros(3, 1, 2, dtype=torch.uint8), torch.zeros(9, 1, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"sample 1: 9 rows with a prompt of 4 .* {width} wide"):
        align([fitting, long], [2, 4], prompt_width, width, layout)


@pytest.mark.parametrize("dtype", ["<i2", ">i2", ">u2", ">i4", ">i8", "u1"])
def test_bytes_in_any_order(dtype):
    """Of a file or a wire of another machine."""
    layout = RoutingLayout((0, 2), 3, num_experts=200, top_k=2)
    ids = np.arange(40).reshape(5, 4, 2)[:, :2] * 3 % 200
    record = to_record(ids.astype(dtype), layout, 0)
    assert torch.equal(unpack(record, layout).long(), torch.from_numpy(ids))


@pytest.mark.parametrize("num_experts", [200, 300], ids=["one byte", "two bytes"])
@pytest.mark.parametrize("slots", [2, 3], ids=["of MoE layers", "of decoder layers"])
@pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray], ids=["torch", "numpy"])
def test_a_buffer_that_is_filled_again(kind, slots, num_experts):
    """A `rollout_func` may return views of a buffer that its engine writes the next rollout into."""
    layout = RoutingLayout((0, 1), 3, num_experts, top_k=2)
    buffer = np.arange(6 * slots * 2).reshape(6, slots, 2).astype("u1" if num_experts == 200 else "i2")
    record = to_record(kind(buffer[:5]), layout, 0)
    before = record.clone()
    buffer[:] = 0
    assert torch.equal(record, before) and before.any()


@pytest.mark.parametrize("dtype", [">f4", "f8", "O", "?"])
def test_what_are_no_ids_is_refused_with_the_sample(dtype):
    layout = RoutingLayout((0, 2), 3, num_experts=200, top_k=2)
    with pytest.raises(ValueError, match="sample 7: `routed_experts` has dtype .*, but expert ids are integers"):
        to_record(np.zeros((5, 2, 2), dtype), layout, 7)
