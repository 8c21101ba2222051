"""Where the real tokens of a padded batch are."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_r3.routers.packing import PackedBatch, has_holes

MASK = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=5))
def test_rows_are_those_of_the_mask(rows):
    width = max(map(sum, rows))
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for row, (left, real, _) in enumerate(rows):
        mask[row, left : left + real] = 1
    batch = PackedBatch.of(mask.bool())
    lengths = [real for _, real, _ in rows if real]
    if not lengths or sum(lengths) == mask.numel():
        assert batch is None
        return
    assert batch.lengths == lengths
    rows = batch.rows.rows_N
    assert torch.equal(rows, mask.flatten().nonzero()[:, 0])
    assert torch.equal(batch.place(rows), torch.arange(sum(lengths)))
    assert torch.equal(batch.rows.real(torch.arange(mask.numel())), rows)


def test_a_row_with_a_hole():
    mask = MASK.clone()
    mask[1, 2] = 0
    assert not has_holes(MASK.bool()) and has_holes(mask.bool())
    assert not has_holes(torch.zeros(2, 0).bool()) and not has_holes(torch.zeros(2, 3).bool())
