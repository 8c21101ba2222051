"""Sampling masks as data: compressed rows of the token ids that could be drawn."""

import pytest
import torch

from trl_r3.records.sampling_mask import SamplingMask

ROWS = [[5, 9], [], [0, 3, 7], [2]]
TOKENS = [9, 4, 0, 2]


def rows_of(mask):
    return [mask.ids[first:last].tolist() for first, last in zip(mask.offsets[:-1], mask.offsets[1:], strict=True)]


def test_rows_survive():
    mask = SamplingMask.of(ROWS)
    assert rows_of(mask) == ROWS
    assert len(mask) == 4
    assert mask.counts.tolist() == [2, 0, 3, 1]
    assert (mask.ids.dtype, mask.offsets.dtype) == (torch.int32, torch.int32)
    assert rows_of(SamplingMask.of([torch.tensor(row, dtype=torch.int64) for row in ROWS])) == ROWS


@pytest.mark.parametrize("first", range(5))
@pytest.mark.parametrize("last", range(5))
def test_slices_and_joins_are_those_of_lists(first, last):
    mask = SamplingMask.of(ROWS)
    assert rows_of(mask[first:last]) == ROWS[first:last]
    joined = SamplingMask.join([mask[first:last], SamplingMask.unrestricted(2), mask])
    assert rows_of(joined) == [*ROWS[first:last], [], [], *ROWS]


@pytest.mark.parametrize("step", [2, -1])
def test_rows_with_gaps_are_refused(step):
    with pytest.raises(ValueError, match=f"every {step}th row"):
        SamplingMask.of([[1], [2], [3]])[::step]


def test_nothing_is_a_mask_too():
    assert rows_of(SamplingMask.join([])) == rows_of(SamplingMask.of([])) == []
    SamplingMask.of([]).check([], 0)


@pytest.mark.parametrize(("rows", "kept"), [(1, 1), (50, 8), (3, 30_000)])
def test_bytes(rows, kept):
    mask = SamplingMask.of([list(range(kept))] * rows)
    assert mask.nbytes <= 4 * rows * kept + 8 * rows
    assert mask.ids.untyped_storage().nbytes() == 4 * rows * kept


def test_what_was_drawn_was_kept():
    mask = SamplingMask.of(ROWS)
    mask.check(TOKENS, 3)
    with pytest.raises(ValueError, match=r"sample 3: token 8 was sampled at position 2 .* not among the 3 ids"):
        mask.check([9, 4, 8, 2], 3)
    mask.check([9, 8, 0, 2], 3)  # where nothing is restricted, any token is right
    with pytest.raises(ValueError, match=r"sample 3: its sampling mask has 4 rows, but 3 tokens were sampled"):
        mask.check(TOKENS[:3], 3)


@pytest.mark.parametrize("row", [[0.5], torch.ones(1, 1, dtype=torch.int64), torch.tensor([True])])
def test_no_ids(row):
    with pytest.raises(ValueError, match="the kept ids of token 1 are"):
        SamplingMask.of([[1], row])
