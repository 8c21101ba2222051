"""Where the real tokens of a padded batch are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_r3.routers.packing import PackedBatch, why_padded

IDS = torch.zeros(2, 6, dtype=torch.int64)
MASK = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=5))
def test_rows_are_those_of_the_mask(rows):
    width = max(map(sum, rows))
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for row, (left, real, _) in enumerate(rows):
        mask[row, left : left + real] = 1
    batch = PackedBatch.of(mask)
    lengths = [real for _, real, _ in rows if real]
    if not lengths or sum(lengths) == mask.numel():
        assert batch is None
        return
    assert batch.lengths == lengths
    assert torch.equal(batch.rows_N, mask.flatten().nonzero()[:, 0])
    assert torch.equal(batch.place(batch.rows_N), torch.arange(sum(lengths)))
    values = torch.arange(mask.numel())
    assert torch.equal(batch.real(values), batch.rows_N)


def test_a_row_with_a_hole_is_not_packed():
    mask = MASK.clone()
    mask[1, 2] = 0
    assert PackedBatch.of(MASK) is not None and PackedBatch.of(mask) is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attention_mask": None}, "attention mask is not one of"),
        ({"attention_mask": MASK[:, :5]}, "attention mask is not one of"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 6, 4)}, "not given `input_ids`"),
        ({"position_ids": torch.zeros(3, 2, 6)}, "position ids are not those"),
        ({"output_attentions": True}, "asked for output_attentions"),
        ({"past_key_values": object()}, "asked for a cache"),
    ],
)
def test_arguments_that_speak_against_it(changes, text):
    kwargs = {"input_ids": IDS, "attention_mask": MASK}
    assert why_padded((), kwargs) is None
    assert text in why_padded((), {**kwargs, **changes})
