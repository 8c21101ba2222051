"""The record as data: storage loses nothing, validation names what is wrong (properties 12, 13, 15 and 16)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_r3.record_checks import check_length, check_rows, check_stale
from trl_r3.routed_experts import RoutingShape, align, missing_rows, pack, select_moe_layers, unpack

SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]
EXPERTS = (2, 8, 128, 254, 255, 256, 257, 512)


@st.composite
def records(draw, min_rows=0, experts=EXPERTS, missing=True):
    """A shape and int64 ids `(R, L, K)` of distinct experts, some rows missing."""
    num_experts = draw(st.sampled_from(experts))
    top_k = draw(st.integers(1, min(num_experts, 8)))
    decoder_layers = draw(st.integers(1, 6))
    layers = draw(st.sets(st.integers(0, decoder_layers - 1), min_size=1).map(sorted))
    shape = RoutingShape(tuple(layers), decoder_layers, num_experts, top_k)
    rows = draw(st.integers(min_rows, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    order = rng.permuted(np.tile(np.arange(num_experts), (rows, len(layers), 1)), axis=-1)
    ids = torch.from_numpy(order[..., :top_k].copy())
    if missing:
        ids[torch.from_numpy(rng.random(rows) < draw(st.sampled_from([0.0, 0.3, 1.0])))] = -1
    return shape, ids


def fits(dtype, ids):
    info = torch.iinfo(dtype)
    return ids.numel() == 0 or (info.min <= ids.min() and ids.max() <= info.max)


@given(records(), st.sampled_from(SIGNED + UNSIGNED))
def test_storage_round_trip(drawn, dtype):
    shape, ids = drawn
    if not fits(dtype, ids):
        dtype = torch.int64
    stored = pack(ids.to(dtype), shape)
    assert stored.dtype == (torch.uint8 if shape.num_experts <= 255 else torch.int16)
    assert stored.element_size() * stored.numel() == ids.numel() * (1 if shape.num_experts <= 255 else 2)
    assert torch.equal(unpack(stored, shape).long(), ids)
    assert unpack(stored, shape).dtype == torch.int16
    assert torch.equal(missing_rows(stored, shape), (ids == -1).all(-1).all(-1))
    assert torch.equal(pack(stored, shape), stored)
    assert torch.equal(pack(unpack(stored, shape), shape), stored)
    check_rows(stored, shape)


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_last_expert_and_missing_are_kept_apart(num_experts):
    shape = RoutingShape((0,), 1, num_experts, 1)
    ids = torch.tensor([num_experts - 1, 0, -1, num_experts - 2]).reshape(4, 1, 1)
    stored = pack(ids, shape)
    assert unpack(stored, shape).flatten().tolist() == [num_experts - 1, 0, -1, num_experts - 2]
    assert missing_rows(stored, shape).tolist() == [False, False, True, False]
    narrow = ids.to(torch.uint8)  # the mistake: one byte whatever the number of experts
    kept = torch.equal(narrow.long().where(narrow != 255, -1), ids)
    assert kept == (num_experts <= 255)


def test_missing_in_bytes():
    """Engines that store bytes mark a missing row by 255, which is an expert from 256 on."""
    few, many = (RoutingShape((0,), 1, num_experts, 1) for num_experts in (255, 256))
    stored = torch.tensor([255, 7], dtype=torch.uint8).reshape(2, 1, 1)
    assert unpack(pack(stored, few), few).flatten().tolist() == [-1, 7]
    assert unpack(pack(stored, many), many).flatten().tolist() == [255, 7]


@given(records(min_rows=1, missing=False), st.sampled_from([torch.int16, torch.int32, torch.int64]), st.data())
def test_ids_outside_are_refused(drawn, dtype, data):
    shape, ids = drawn
    row, slot, k = (data.draw(st.integers(0, size - 1)) for size in ids.shape)
    wrong = data.draw(
        st.one_of(st.integers(-(2**15), -2), st.integers(shape.num_experts, 2**15 - 1), st.just(shape.num_experts))
    )
    ids = ids.to(dtype)
    ids[row, slot, k] = wrong
    place = rf"sample 3, decoder layer {shape.moe_layers[slot]} \(MoE layer {slot}\), row {row}: expert id {wrong} is"
    with pytest.raises(ValueError, match=rf"{place} outside \[0, {shape.num_experts}\)"):
        pack(ids, shape, sample=3)
    batch = torch.stack([ids.clone().fill_(0), ids])
    with pytest.raises(ValueError, match=place.replace("sample 3", "sample 1")):
        pack(batch, shape)


@given(records(min_rows=1, experts=(8, 255, 256)), st.data())
def test_torn_rows_are_refused(drawn, data):
    shape, ids = drawn
    if ids[0].numel() == 1:
        return  # one id cannot be torn
    row, slot, k = (data.draw(st.integers(0, size - 1)) for size in ids.shape)
    ids[row] = torch.arange(shape.top_k)
    ids[row, slot, k] = -1
    message = rf"sample 5, decoder layer \d+ .*, row {row}: \d+ of {ids[row].numel()} ids"
    with pytest.raises(ValueError, match=message):
        check_rows(pack(ids, shape), shape, sample=5)


@given(records(min_rows=1), st.data())
def test_duplicates_are_refused(drawn, data):
    shape, ids = drawn
    if shape.top_k == 1:
        return
    row, slot = (data.draw(st.integers(0, size - 1)) for size in ids.shape[:2])
    one, other = data.draw(st.permutations(range(shape.top_k)))[:2]
    ids[row] = torch.arange(shape.top_k)
    ids[row, slot, one] = ids[row, slot, other]
    expert = int(ids[row, slot, other])
    layer = shape.moe_layers[slot]
    message = rf"sample 2, decoder layer {layer} \(MoE layer {slot}\), row {row}: expert {expert} "
    with pytest.raises(ValueError, match=message):
        check_rows(pack(ids, shape), shape, sample=2)


def test_layer_of_zeros_is_refused():
    shape = RoutingShape((1, 4), 6, 8, 1)
    record = torch.arange(16).reshape(8, 2, 1) % 7 + 1
    check_rows(pack(record, shape), shape)
    record[:, 1] = 0
    with pytest.raises(ValueError, match=r"sample 3, decoder layer 4 \(MoE layer 1\): all 8 rows are expert 0 of 8"):
        check_rows(pack(record, shape), shape, sample=3)
    record[3] = -1  # missing rows say nothing about the layer, and seven rows may be a coincidence
    check_rows(pack(record, shape), shape)


@pytest.mark.parametrize(("run", "refused"), [(7, False), (8, True), (30, True)])
@pytest.mark.parametrize("num_experts", [8, 300])
def test_stale_rows(run, refused, num_experts):
    shape = RoutingShape((0, 2), 3, num_experts, 2)
    rng = np.random.default_rng(0)
    order = rng.permuted(np.tile(np.arange(num_experts), (50, 2, 1)), axis=-1)
    record = torch.from_numpy(order[..., :2].copy())
    record[3], record[4 : 4 + run], record[4 + run] = (torch.tensor(row) for row in ([0, 1], [5, 6], [0, 1]))
    stored, tokens = pack(record, shape), torch.arange(51)
    check_stale(stored, torch.zeros(51, dtype=torch.long), shape)
    one_layer = stored.clone()
    one_layer[5 : 4 + run : 2, 1] = torch.tensor([2, 3]).to(stored)
    check_stale(one_layer, tokens, shape)
    missing = stored.clone()
    missing[4 : 4 + run] = shape.missing
    check_stale(missing, tokens, shape)
    if not refused:
        check_stale(stored, tokens, shape)
        return
    for given_tokens in (tokens, tokens.tolist()):
        with pytest.raises(ValueError, match=rf"sample 1, decoder layer 0 .*, row 4: {run} rows .* 2 MoE layers"):
            check_stale(stored, given_tokens, shape, sample=1)


@pytest.mark.parametrize("rows", range(6))
def test_length(rows):
    """A sequence of T tokens has T - 1 rows, or T if the engine fed its last token as well."""
    if rows in (3, 4):
        check_length(rows, 4, 0)
        return
    with pytest.raises(ValueError, match=rf"sample 7: the record has {rows} rows for 4 tokens, expected 3"):
        check_length(rows, 4, 7)


# Layers by index, never by order


@given(records(min_rows=1))
def test_both_layouts_are_understood(drawn):
    shape, ids = drawn
    every_layer = torch.full((ids.shape[0], shape.num_decoder_layers, shape.top_k), 999)
    for slot, layer in enumerate(shape.moe_layers):
        every_layer[:, layer] = ids[:, slot]
    assert torch.equal(select_moe_layers(every_layer, shape), ids)
    assert torch.equal(select_moe_layers(ids, shape), ids)
    by_ordinal = every_layer[:, : len(shape.moe_layers)]  # the mistake
    dense_before = shape.moe_layers != tuple(range(len(shape.moe_layers)))
    assert torch.equal(by_ordinal, ids) == (not dense_before)


@given(records(min_rows=1), st.integers(0, 9))
def test_other_layouts_are_refused(drawn, slots):
    shape, ids = drawn
    if slots in (len(shape.moe_layers), shape.num_decoder_layers):
        slots = shape.num_decoder_layers + 1
    record = torch.zeros(ids.shape[0], slots, shape.top_k, dtype=torch.long)
    words = rf"{slots} layer slots.* {len(shape.moe_layers)} MoE layers and {shape.num_decoder_layers} decoder layers"
    with pytest.raises(ValueError, match=words):
        select_moe_layers(record, shape)
    with pytest.raises(ValueError, match=rf"last dimension must be {shape.top_k}"):
        select_moe_layers(torch.cat([ids, ids[..., :1]], -1), shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.complex128])
def test_ids_are_integers(dtype):
    shape = RoutingShape((0,), 1, 8, 2)
    with pytest.raises(ValueError, match=f"{dtype}, but expert ids are integers"):
        select_moe_layers(torch.zeros(3, 1, 2, dtype=dtype), shape)


# Padding


@settings(max_examples=50)
@given(st.data())
def test_alignment_of_padded_batches(data):
    """Every row lands at its token, and every other position is missing: never expert 0, nor anything else."""
    num_experts = data.draw(st.sampled_from([8, 256]))
    shape = RoutingShape((0, 2), 3, num_experts, 2)
    prompts = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    completions = [data.draw(st.integers(1, 6)) for _ in prompts]
    prompt_width = max(prompts) + data.draw(st.integers(0, 3))
    width = prompt_width + max(completions) + data.draw(st.integers(0, 3))
    # a row tells its sample and its position
    rows = [
        torch.tensor([[[i % 8, (i + 1 + r % 7) % 8]] * 2 for r in range(p + c - 1)])
        for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
    ]
    batch = align([pack(record, shape) for record in rows], prompts, prompt_width, width, shape)
    assert batch.shape == (len(prompts), width, 2, 2) and batch.dtype == shape.storage_dtype
    aligned = unpack(batch, shape).long()
    for i, record in enumerate(rows):
        start = prompt_width - prompts[i]
        for position in range(width):
            row = position - start
            expected = record[row] if 0 <= row < len(record) else torch.full((2, 2), -1)
            assert torch.equal(aligned[i, position], expected)


@pytest.mark.parametrize(("prompt_width", "width"), [(3, 9), (4, 8)])
def test_alignment_that_does_not_fit_is_refused(prompt_width, width):
    shape = RoutingShape((0,), 1, 8, 2)
    fitting, long = torch.zeros(3, 1, 2, dtype=torch.uint8), torch.zeros(9, 1, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"sample 1: a record of 9 rows with a prompt of 4 .* {width} wide"):
        align([fitting, long], [2, 4], prompt_width, width, shape)
