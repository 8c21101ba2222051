"""A mask is read from the device once, and never believed when it is another one."""

import pytest
import torch
from counted_reads import CountedReads

from trl_r3.records.real_tokens import RealTokens

MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])


def test_slices_of_a_mask_are_known():
    mask, real = MASK.clone().as_subclass(CountedReads), RealTokens()
    with mask.counted() as reads:
        for first, last in ((0, 4), (0, 2), (2, 4), (3, 4), (0, 4)):
            found = real.of(mask[first:last])
            assert torch.equal(found, MASK[first:last].bool()) and type(found) is torch.Tensor
    assert reads == ["cpu"]


def test_what_came_along_is_not_read_again():
    mask = MASK.clone().as_subclass(CountedReads)
    with mask.counted() as reads:
        assert torch.equal(RealTokens(mask, MASK.bool()).of(mask[1:]), MASK[1:].bool())
    assert reads == []


CHANGES = {
    "edited": lambda mask: mask.mul_(torch.tensor([[1], [0], [1], [1]])),
    "edited by a slice": lambda mask: mask[2:].zero_(),
    "another mask": lambda mask: 1 - mask,
    "copied": lambda mask: mask.clone(),
    "other columns": lambda mask: mask[:, 1:],
    "fewer columns": lambda mask: mask[:, :3],
    "rows in another order": lambda mask: mask[[1, 0, 2, 3]],
    "every second row": lambda mask: mask[::2],
    "another dtype": lambda mask: mask.int(),
    "a view of one row": lambda mask: mask[1:2].expand(3, 4),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_other_mask_is_read(change):
    mask, real = MASK.clone(), RealTokens()
    assert torch.equal(real.of(mask), MASK.bool())
    changed = change(mask)
    assert torch.equal(real.of(changed), changed.bool())
    assert torch.equal(real.of(mask), mask.bool())


def test_rows_that_are_one_begin_nowhere_else():
    """Bytes of one row that is expanded: the next byte is another row, not the next of these."""
    row = torch.tensor([[True, False, True, True, True]])
    real = RealTokens()
    for first in (0, 1):
        mask = row[:, first : first + 4].expand(3 - first, 4)
        assert torch.equal(real.of(mask), mask)


def test_rows_beyond_the_mask_that_was_read():
    """A batch that is scored in two parts, of which the second was read first."""
    mask, real = MASK.clone(), RealTokens()
    for part in (mask[2:], mask[:2], mask[1:], mask):
        assert torch.equal(real.of(part), part.bool())


def test_edits_that_are_not_counted():
    with torch.inference_mode():
        mask, real = MASK.clone(), RealTokens()
        for _ in range(2):
            assert torch.equal(real.of(mask), mask.bool())
            mask[1, 2:] = 0
        assert torch.equal(RealTokens(mask, MASK.bool()).of(mask), mask.bool())
