"""Which rows of a forward the sampling masks of a batch belong to."""

import pytest
import torch

from trl_r3.masks.masked_batch import MaskedBatch
from trl_r3.records.checks import MisalignedRecordError
from trl_r3.records.samples import Sample
from trl_r3.records.sampling_mask import SamplingMask

ROWS = [[5, 9], [], [0, 3, 7], [2]]
TOKENS = [9, 4, 0, 2]


@pytest.fixture
def samples():
    prompts = [[3], [4, 5], [6, 7, 8]]
    completions = [TOKENS, TOKENS[:1], TOKENS[2:]]
    masks = [ROWS, ROWS[:1], ROWS[2:]]
    return [
        Sample(10 + i, torch.tensor([*p, *c]), len(p), torch.empty(0), mask=SamplingMask.of(m))
        for i, (p, c, m) in enumerate(zip(prompts, completions, masks, strict=True))
    ]


def batch_of(samples, prompt_width=3, width=7):
    input_ids, scored = (
        torch.zeros(len(samples), width, dtype=torch.int64),
        torch.zeros(len(samples), width - 1).bool(),
    )
    for row, sample in enumerate(samples):
        start = prompt_width - sample.prompt_length
        input_ids[row, start : start + len(sample.tokens)] = sample.tokens
        scored[row, prompt_width - 1 : start + len(sample.tokens) - 1] = True
    return input_ids, scored


def kept_by_token(kept, input_ids):
    """Sample, position of the predicted token, the token and its kept ids, in the order of the forward."""
    width = input_ids.shape[1] - 1
    ids = kept.ids.split(kept.counts.tolist())
    found = [
        (int(row) // width, int(row) % width + 1, each.tolist()) for row, each in zip(kept.rows, ids, strict=True)
    ]
    return sorted((b, t, int(input_ids[b, t]), each) for b, t, each in found)


EXPECTED = [(0, 3 + i, TOKENS[i], ROWS[i]) for i in range(4)]
EXPECTED += [(1, 3, TOKENS[0], ROWS[0]), (2, 3, TOKENS[2], ROWS[2]), (2, 4, TOKENS[3], ROWS[3])]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_prediction_gets_its_row(samples, size):
    batch, (input_ids, scored), found = MaskedBatch(samples, 3), batch_of(samples), []
    for first in range(0, 3, size):
        part = slice(first, first + size)
        kept = batch.take(input_ids[part], scored[part])
        found += [(b + first, *rest) for b, *rest in kept_by_token(kept, input_ids[part])]
        counts = [count or 10**9 for count in kept.counts.tolist()]
        assert counts == sorted(counts)  # tiles rely on it
    batch.check_done()
    assert found == EXPECTED


def test_shuffled_samples_take_their_masks_along(samples):
    order = [2, 0, 1]
    shuffled = [samples[i] for i in order]
    input_ids, scored = batch_of(shuffled)
    found = kept_by_token(MaskedBatch(shuffled, 3).take(input_ids, scored), input_ids)
    assert sorted((order[b], *rest) for b, *rest in found) == EXPECTED
    with pytest.raises(MisalignedRecordError, match="sample 10: .* tokens of the batch differ"):
        MaskedBatch(samples, 3).take(input_ids, scored)


def test_what_the_loss_leaves_out_is_left_out(samples):
    input_ids, scored = batch_of(samples)
    scored[0] = False
    scored[2, 2] = False
    found = kept_by_token(MaskedBatch(samples, 3).take(input_ids, scored), input_ids)
    assert found == [EXPECTED[4], EXPECTED[6]]


def test_what_is_no_completion_is_refused(samples):
    input_ids, scored = batch_of(samples)
    scored[1, 1] = True  # a token of the prompt
    with pytest.raises(RuntimeError, match="positions that are no sampled tokens"):
        MaskedBatch(samples, 3).take(input_ids, scored)
    input_ids, scored = batch_of(samples)
    scored[1, 4] = True  # padding
    with pytest.raises(RuntimeError, match="positions that are no sampled tokens"):
        MaskedBatch(samples, 3).take(input_ids, scored)


def test_every_sample_is_scored_once(samples):
    batch, (input_ids, scored) = MaskedBatch(samples, 3), batch_of(samples)
    batch.take(input_ids[:2], scored[:2])
    with pytest.raises(RuntimeError, match="2 of 3 samples were scored"):
        batch.check_done()
    with pytest.raises(RuntimeError, match="a forward scores samples 2 to 3, but the batch has 3"):
        batch.take(input_ids[:2], scored[:2])
