"""Rows that no router can have selected are refused by name, and odd ones that it can are not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from records.drawn import records

from trl_r3.records.checks import check_length, check_rows
from trl_r3.records.record import pack


@given(records(min_rows=1, experts=(8, 255, 256)), st.data())
def test_torn_rows_are_refused(drawn, data):
    layout, ids = drawn
    if ids[0].numel() == 1:
        return  # one id cannot be torn
    row, slot, k = (data.draw(st.integers(0, size - 1)) for size in ids.shape)
    ids[row] = torch.arange(layout.top_k)
    ids[row, slot, k] = -1
    message = rf"sample 5, decoder layer \d+ .*, row {row}: \d+ of {ids[row].numel()} ids"
    with pytest.raises(ValueError, match=message):
        check_rows(pack(ids, layout), layout, sample=5)


@given(records(min_rows=1), st.data())
def test_duplicates_are_refused(drawn, data):
    layout, ids = drawn
    if layout.top_k == 1:
        return
    row, slot = (data.draw(st.integers(0, size - 1)) for size in ids.shape[:2])
    one, other = data.draw(st.permutations(range(layout.top_k)))[:2]
    ids[row] = torch.arange(layout.top_k)
    ids[row, slot, one] = ids[row, slot, other]
    expert = int(ids[row, slot, other])
    layer = layout.moe_layers[slot]
    message = rf"sample 2, decoder layer {layer} \(MoE layer {slot}\), row {row}: expert {expert} "
    with pytest.raises(ValueError, match=message):
        check_rows(pack(ids, layout), layout, sample=2)


@given(records(min_rows=1, missing=False), st.data())
def test_routes_that_look_odd_are_no_error(drawn, data):
    """Routers collapse, and send neighbours or everything to the same experts: ids alone say nothing about that."""
    layout, ids = drawn
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, ids.shape[0])] * 2)))
    ids[first:last] = ids[:1]
    check_rows(pack(ids, layout), layout)
    ids[:] = torch.arange(layout.top_k)  # expert 0 throughout, where K is 1
    check_rows(pack(ids, layout), layout)


@pytest.mark.parametrize("rows", range(6))
def test_length(rows):
    """A sequence of T tokens has T - 1 rows, or T if the engine fed its last token as well."""
    if rows in (3, 4):
        check_length(rows, 4, 0)
        return
    with pytest.raises(ValueError, match=rf"sample 7: the record has {rows} rows for 4 tokens, expected 3"):
        check_length(rows, 4, 7)
