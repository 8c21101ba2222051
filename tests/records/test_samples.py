"""Whose row is replayed where: through padding, shuffling, splitting and packing, and never on other tokens.

Where a model runs, its routers encode the token id.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import as_sets, changed_rows, some_rows, stacked
from token_oracle import (
    LAYERS,
    OF_ROLLOUT,
    OF_TRAINING,
    TOP_K,
    VOCAB,
    engine,
    pad,
    replayed,
    samples,
    samples_of,
    with_models,
    wrong_rows,
)

from trl_r3 import RoutingLayout
from trl_r3.cli.experts import executed_ids
from trl_r3.records.checks import MisalignedRecordError
from trl_r3.records.record import align, slice_samples, unpack
from trl_r3.records.samples import CheckedTokens, Sample, ScoredBatch

SHAPE = RoutingLayout(moe_layers=(0, 2, 3), num_decoder_layers=4, num_experts=100, top_k=2)
few = settings(max_examples=60, deadline=None)


def test_the_oracles_route_by_token(rollout, training):
    every = torch.arange(VOCAB)[None]
    for (_, model), choice in ((rollout, OF_ROLLOUT), (training, OF_TRAINING)):
        with executed_ids(model) as seen, torch.no_grad():
            model(every)
        assert torch.equal(as_sets(stacked(seen, 1)[0]), as_sets(choice))


@with_models
@given(drawn=samples, left=st.integers(0, 3), right=st.integers(0, 3))
def test_padding(rollout, training, drawn, left, right):
    prompt_width = max(len(prompt) for prompt, _ in drawn) + left
    width = prompt_width + max(len(completion) for _, completion in drawn) + right
    ids, mask, recorded = pad(drawn, prompt_width, width)
    layout = training[0].layout
    records = [engine(rollout, prompt + completion) for prompt, completion in drawn]
    record = unpack(align(records, [len(prompt) for prompt, _ in drawn], prompt_width, width, layout), layout)
    assert wrong_rows(replayed(training, record, ids, mask), ids, recorded) == 0
    # one slot per decoder layer, and its slots read by order
    every_layer = torch.zeros(*ids.shape, 4, TOP_K, dtype=torch.int16)
    every_layer[:, :, LAYERS] = record
    assert wrong_rows(replayed(training, every_layer, ids, mask), ids, recorded) == 0
    swapped = replayed(training, every_layer[:, :, [3, 1]], ids, mask)
    assert wrong_rows(swapped, ids, recorded) == 2 * int(recorded.sum())


@with_models
@given(drawn=samples, shift=st.sampled_from([-1, 1]))
def test_shift_by_one_is_told_apart(rollout, training, drawn, shift):
    """The row of token p belongs to token p, not to the one that it predicts, nor to the one before."""
    drawn = [([1, 2, *prompt], [3, 4]) for prompt, _ in drawn]
    prompt_width = max(len(prompt) for prompt, _ in drawn)
    ids, mask, recorded = pad(drawn, prompt_width, prompt_width + 2)
    layout = training[0].layout
    records = [engine(rollout, prompt + completion) for prompt, completion in drawn]
    record = unpack(align(records, [len(prompt) for prompt, _ in drawn], prompt_width, ids.shape[1], layout), layout)
    assert wrong_rows(replayed(training, record, ids, mask), ids, recorded) == 0
    shifted = record.roll(shift, 1)
    assert wrong_rows(replayed(training, shifted, ids, mask), ids, recorded) > 0
    zeros = torch.where(record == -1, torch.arange(TOP_K, dtype=torch.int16), record)
    assert wrong_rows(replayed(training, zeros, ids, mask), ids, recorded) > 0


@with_models
@given(drawn=samples, data=st.data())
def test_shuffled_and_split_batches(rollout, training, drawn, data):
    """Rows are recorded in one order, trained in another, in chunks of unequal size that share one batch."""
    replay, model = training
    records = [engine(rollout, prompt + completion) for prompt, completion in drawn]
    order = data.draw(st.permutations(range(len(drawn))))
    drawn, records = [drawn[i] for i in order], [records[i] for i in order]
    prompt_width = max(len(prompt) for prompt, _ in drawn)
    ids, mask, recorded = pad(drawn, prompt_width, prompt_width + max(len(completion) for _, completion in drawn))
    source = ScoredBatch(samples_of(drawn, records), prompt_width, replay.layout)
    start = 0
    with torch.no_grad(), replay.replay_from(source) as stats:
        while start < len(drawn):
            size = data.draw(st.integers(1, len(drawn) - start))
            chunk = slice(start, start + size)
            with executed_ids(model) as seen:
                model(ids[chunk], attention_mask=mask[chunk])
            assert wrong_rows(stacked(seen, size), ids[chunk], recorded[chunk]) == 0
            start += size
    source.check_done()
    assert int(stats.recorded_tokens) == int(recorded.sum())
    assert int(stats.changed_routers) == int(recorded.sum()) * len(LAYERS), "live routes differ everywhere"


def test_scored_batch_refuses_too_many_and_too_few(rollout, training):
    records = [engine(rollout, [1, 2, 3]) for _ in range(3)]
    source = ScoredBatch(samples_of([([1, 2], [3])] * 3, records), 2, training[0].layout)
    source.take(2, 3)
    with pytest.raises(RuntimeError, match="2 of 3 samples"):
        source.check_done()
    with pytest.raises(RuntimeError, match="scores samples 2 to 3, but the batch has 3"):
        source.take(2, 3)


@pytest.mark.parametrize("mistake", ["swapped", "shifted", "edited", None])
def test_tokens_are_held_against_the_record(rollout, training, mistake):
    """Whatever reorders a batch and leaves its records where they were."""
    replay, model = training
    drawn = [([1, 2, 3], [4, 5]), ([6, 7], [8, 9, 10]), ([11], [12])]
    source = ScoredBatch(samples_of(drawn, [engine(rollout, p + c) for p, c in drawn]), 3, replay.layout)
    ids, mask, _ = pad(drawn, 3, 6)
    if mistake == "swapped":
        ids, mask = ids[[0, 2, 1]], mask[[0, 2, 1]]
    elif mistake == "shifted":
        ids = ids.roll(1, 1)
    elif mistake == "edited":
        ids[2, 3] = 13
    forward = partial(model, ids, attention_mask=mask)
    with torch.no_grad(), replay.replay_from(source):
        if mistake is None:
            forward()
            return
        with pytest.raises(MisalignedRecordError, match=r"sample \d: \d+ tokens of the batch differ .* position \d"):
            forward()
        source.scored = 0
        model(pad(drawn, 3, 6)[0], attention_mask=pad(drawn, 3, 6)[1])


@with_models
@given(drawn=samples)
def test_slices_of_a_padded_batch(rollout, drawn):
    """A generated batch is padded; records are not."""
    replay, model = rollout
    prompt_width = max(len(prompt) for prompt, _ in drawn)
    ids, _, _ = pad(drawn, prompt_width, prompt_width + max(len(completion) for _, completion in drawn))
    with torch.no_grad(), replay.record() as recorded:
        model(ids)
    lengths = [[len(part) for part in sample] for sample in drawn]
    slices = slice_samples(recorded.routed_experts, prompt_width, *zip(*lengths, strict=True))
    for (prompt, completion), rows in zip(drawn, slices, strict=True):
        assert torch.equal(as_sets(rows), as_sets(OF_ROLLOUT[torch.tensor(prompt + completion)][:-1]))


@with_models
@given(drawn=samples)
def test_packing(rollout, training, drawn):
    """Samples one after the other: the last token of each has no row, and what follows does not move up."""
    ids, positions, rows, recorded = [], [], [], []
    for prompt, completion in drawn:
        tokens = prompt + completion
        ids += tokens
        positions += range(len(tokens))
        rows += [unpack(engine(rollout, tokens), training[0].layout), torch.full((1, 2, TOP_K), -1, dtype=torch.int16)]
        recorded += [True] * (len(tokens) - 1) + [False]
    ids, recorded = torch.tensor([ids]), torch.tensor([recorded])
    kwargs = {"position_ids": torch.tensor([positions])}
    executed = replayed(training, torch.cat(rows)[None], ids, **kwargs)
    assert wrong_rows(executed, ids, recorded) == 0
    if len(drawn) > 1:
        without_gaps = torch.cat([*rows[::2], *rows[1::2]])[None]
        executed = replayed(training, without_gaps, ids, **kwargs)
        assert wrong_rows(executed, ids, recorded) > 0 or not changed_rows(without_gaps, torch.cat(rows)[None]).any()


@st.composite
def padded_batches(draw):
    """(batch, prompt width, prompt lengths, completion lengths) with other ids in the padding."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6))
    prompts, completions = [p for p, _ in lengths], [c for _, c in lengths]
    width = max(prompts) + draw(st.integers(0, 3))
    total = width + max(completions) + draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch = some_rows(len(lengths) * total, generator).unflatten(0, (len(lengths), total))
    return batch, width, prompts, completions


def without_tokens(prompts, records):
    return [
        Sample(i, torch.zeros(len(record) + 1), prompt, record)
        for i, (prompt, record) in enumerate(zip(prompts, records, strict=True))
    ]


@few
@given(padded_batches(), st.integers(1, 6), st.integers(0, 4))
def test_records_come_back_to_their_positions(padded, chunk, wider):
    """Cut from one padded batch, laid into another: in chunks, the last of which may be smaller."""
    batch, width, prompts, completions = padded
    records = slice_samples(batch, width, prompts, completions)
    new_width = width + wider
    total = new_width + max(completions)
    scored = ScoredBatch(without_tokens(prompts, records), new_width, SHAPE)
    taken = []
    for start in range(0, len(records), chunk):
        assert scored.scored == start
        taken.append(scored.take(min(chunk, len(records) - start), total))
    scored.check_done()
    laid = torch.cat(taken)
    for sample, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        for position in range(total):
            offset = position - new_width
            if -p <= offset < c - 1:
                assert torch.equal(laid[sample, position], batch[sample, width + offset])
            else:
                assert (laid[sample, position] == SHAPE.missing).all()


@few
@given(padded_batches())
def test_slices_own_their_memory(padded):
    batch, width, prompts, completions = padded
    records = slice_samples(batch.clone(), width, prompts, completions)
    source = batch.clone()
    again = slice_samples(source, width, prompts, completions)
    source.fill_(0)
    assert all(torch.equal(a, b) for a, b in zip(records, again, strict=True))


def test_too_many_or_too_few_samples_are_refused():
    generator = torch.Generator().manual_seed(0)
    scored = ScoredBatch(without_tokens([2, 2, 2], [some_rows(4, generator) for _ in range(3)]), 2, SHAPE)
    scored.take(2, 5)
    with pytest.raises(RuntimeError, match="2 of 3 samples"):
        scored.check_done()
    with pytest.raises(RuntimeError, match="samples 2 to 3, but the batch has 3"):
        scored.take(2, 5)


def test_record_that_does_not_fit_is_refused():
    scored = ScoredBatch(without_tokens([2], [some_rows(9, torch.Generator().manual_seed(0))]), 2, SHAPE)
    with pytest.raises(ValueError, match="9 rows"):
        scored.take(1, 5)


def test_tokens_that_are_copied_or_edited_are_compared_again():
    ids = torch.arange(12).reshape(3, 4)
    checked = CheckedTokens([Sample(i, ids[i].clone(), 2, torch.empty(0)) for i in range(3)], ids, 2)
    checked.check(1, ids[1:])
    checked.check(1, ids[1:].clone())  # the same values elsewhere
    with pytest.raises(MisalignedRecordError, match="sample 1: 4 tokens of the batch differ"):
        checked.check(1, ids[2:].clone())
    with pytest.raises(MisalignedRecordError, match="sample 0"):
        checked.check(0, ids[1:])  # of the batch, but of other samples
    ids[2, 3] = 0
    with pytest.raises(MisalignedRecordError, match="sample 2: 1 tokens of the batch differ"):
        checked.check(1, ids[1:])
