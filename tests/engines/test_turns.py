"""Turns of a rollout joined to one record a sample, with their log-probabilities and sampling masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import kept_rows, some_kept, some_rows

from trl_r3 import RoutingLayout, SamplingMask, Turn, stitch
from trl_r3.records.record import missing_rows

SHAPE = RoutingLayout(moe_layers=(0, 2, 3), num_decoder_layers=4, num_experts=100, top_k=2)
few = settings(max_examples=60, deadline=None)
tokens = st.lists(st.integers(2, 5), min_size=1, max_size=5)  # few different ones, so that samples look alike


@st.composite
def conversations(draw):
    """
    (turns, prompts, completions) of a tool loop as TRL runs it.

    Each sample goes on while its turns call a tool, is given all it said and heard so far, and is cut in its last one.
    """
    prompts = draw(st.lists(tokens, min_size=1, max_size=4))
    turn_counts = [draw(st.integers(1, 3)) for _ in prompts]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    completions = [[] for _ in prompts]
    turns = []
    for number in range(max(turn_counts)):
        going = [sample for sample, count in enumerate(turn_counts) if count > number]
        if number:
            for sample in going:
                completions[sample] += draw(tokens)  # what the tool said
        given_ids = [prompts[sample] + completions[sample] for sample in going]
        sampled = [draw(tokens) for _ in going]
        records = [some_rows(len(a) + len(b) - 1, generator) for a, b in zip(given_ids, sampled, strict=True)]
        logprobs = [-torch.rand(len(ids), generator=generator) for ids in sampled]
        turns.append(Turn(given_ids, sampled, records, logprobs))
        for sample, ids in zip(going, sampled, strict=True):
            is_last = turn_counts[sample] == number + 1
            kept = draw(st.integers(0 if number else 1, len(ids))) if is_last else len(ids)
            completions[sample] += ids[:kept]
    return turns, turn_counts, prompts, completions


def earliest(turns, turn_counts, sample, position):
    """The row of the first turn that fed a token of a sample, found by counting."""
    for number, turn in enumerate(turns):
        going = [other for other, count in enumerate(turn_counts) if count > number]
        if sample in going:
            entry = going.index(sample)
            if position < len(turn.prompt_ids[entry]) + len(turn.completion_ids[entry]) - 1:
                return turn.records[entry][position]
    return None


@few
@given(conversations())
def test_each_row_is_that_of_the_first_turn_that_fed_its_token(conversation):
    turns, turn_counts, prompts, completions = conversation
    joined = stitch(turns, prompts, completions, SHAPE)
    assert joined.prompt_lengths == [len(prompt) for prompt in prompts]
    for sample, record in enumerate(joined.records):
        assert record.shape[0] == len(prompts[sample]) + len(completions[sample]) - 1
        for position, row in enumerate(record):
            assert torch.equal(row, earliest(turns, turn_counts, sample, position))
    assert not any(missing_rows(record, SHAPE).any() for record in joined.records)


@few
@given(conversations())
def test_log_probabilities_are_those_of_the_turn_that_sampled(conversation):
    turns, turn_counts, prompts, completions = conversation
    joined = stitch(turns, prompts, completions, SHAPE)
    for sample, values in enumerate(joined.logprobs):
        expected = torch.full((len(completions[sample]),), float("nan"))
        for number, turn in enumerate(turns):
            going = [other for other, count in enumerate(turn_counts) if count > number]
            if sample in going:
                entry = going.index(sample)
                first = len(turn.prompt_ids[entry]) - len(prompts[sample])
                kept = turn.logprobs[entry][: max(len(expected) - first, 0)]
                expected[first : first + len(kept)] = kept
        assert torch.equal(values.nan_to_num(1.0), expected.nan_to_num(1.0))


@few
@given(conversations())
def test_records_do_not_share_memory(conversation):
    turns, _, prompts, completions = conversation
    joined = stitch(turns, prompts, completions, SHAPE)
    for sample, record in enumerate(joined.records):
        record.fill_(sample)
    assert all((record == sample).all() for sample, record in enumerate(joined.records))


@few
@given(conversations())
def test_turns_without_log_probabilities(conversation):
    turns, _, prompts, completions = conversation
    turns[-1].logprobs = None
    assert stitch(turns, prompts, completions, SHAPE).logprobs is None


def two_turns():
    """One sample: prompt 5 6, says 7 8, hears 9, says 10 11."""
    generator = torch.Generator().manual_seed(0)
    first = Turn([[5, 6]], [[7, 8]], [some_rows(3, generator)])
    second = Turn([[5, 6, 7, 8, 9]], [[10, 11]], [some_rows(6, generator)])
    return first, second


def test_last_token_of_a_turn_gets_its_row_from_the_next():
    first, second = two_turns()
    (record,) = stitch([first, second], [[5, 6]], [[7, 8, 9, 10, 11]], SHAPE).records
    assert torch.equal(record[:3], first.records[0])
    assert torch.equal(record[3:], second.records[0][3:])


def test_last_token_of_a_turn_gets_its_row_from_the_next_also_if_the_turn_has_one():
    """An engine that returns as many rows as tokens: the last one belongs to a token it never fed."""
    first, second = two_turns()
    unused = torch.cat([first.records[0], some_rows(1, torch.Generator().manual_seed(9))])
    first.records = [unused]
    (record,) = stitch([first, second], [[5, 6]], [[7, 8, 9, 10, 11]], SHAPE).records
    assert torch.equal(record[:3], unused[:3])
    assert torch.equal(record[3:], second.records[0][3:])


def test_missing_last_row_of_a_turn_is_filled_by_the_next():
    first, second = two_turns()
    first.records = [torch.cat([first.records[0], torch.full((1, 3, 2), SHAPE.missing, dtype=torch.uint8)])]
    joined = stitch([first, second], [[5, 6]], [[7, 8, 9, 10, 11]], SHAPE)
    assert not any(missing_rows(record, SHAPE).any() for record in joined.records)


def test_one_row_too_many_at_the_end_is_dropped():
    rows = some_rows(4, torch.Generator().manual_seed(1))
    (record,) = stitch([Turn([[5, 6]], [[7, 8]], [rows])], [[5, 6]], [[7, 8]], SHAPE).records
    assert torch.equal(record, rows[:3])


@pytest.mark.parametrize("kept", range(4))
def test_truncation_drops_rows_with_their_tokens(kept):
    first, second = two_turns()
    completion = [7, 8, 9, 10, 11][: kept + 2]
    turns = [first, second] if kept else [first]
    (record,) = stitch(turns, [[5, 6]], [completion], SHAPE).records
    whole = torch.cat([first.records[0], second.records[0][3:]])
    assert torch.equal(record, whole[: len(completion) + 1])


def test_rolled_back_tool_result_leaves_the_turn_before():
    """TRL drops a tool result that is too long before it generates: that sample is in no later turn."""
    generator = torch.Generator().manual_seed(0)
    first = Turn([[5], [5]], [[7, 8], [7, 8]], [some_rows(2, generator), some_rows(2, generator)])
    second = Turn([[5, 7, 8, 9]], [[10]], [some_rows(4, generator)])
    joined = stitch([first, second], [[5], [5]], [[7, 8], [7, 8, 9, 10]], SHAPE)
    assert torch.equal(joined.records[0], first.records[0])
    assert torch.equal(joined.records[1], torch.cat([first.records[1], second.records[0][2:]]))


def test_twins_that_both_go_on_keep_their_order():
    generator = torch.Generator().manual_seed(0)
    first = Turn([[5], [5]], [[7, 8], [7, 8]], [some_rows(2, generator), some_rows(2, generator)])
    second = Turn([[5, 7, 8, 9]] * 2, [[10, 11]] * 2, [some_rows(5, generator), some_rows(5, generator)])
    joined = stitch([first, second], [[5], [5]], [[7, 8, 9, 10, 11]] * 2, SHAPE)
    for sample in range(2):
        expected = torch.cat([first.records[sample], second.records[sample][2:]])
        assert torch.equal(joined.records[sample], expected)


def test_tokens_that_no_turn_fed_are_missing():
    first, _ = two_turns()
    joined = stitch([first], [[5, 6]], [[7, 8, 9, 10, 11]], SHAPE)
    assert (joined.records[0][3:] == SHAPE.missing).all()
    assert torch.equal(joined.records[0][:3], first.records[0])
    assert int(missing_rows(joined.records[0], SHAPE).sum()) == 3


def test_tokens_that_changed_after_the_turn_are_missing():
    """What was fed and what is scored must agree up to a token, for its row to count."""
    first, _ = two_turns()
    (record,) = stitch([first], [[5, 6]], [[17, 8]], SHAPE).records
    assert torch.equal(record[:2], first.records[0][:2])
    assert (record[2:] == SHAPE.missing).all()


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_wrong_length_names_sample_and_both_numbers(rows):
    generator = torch.Generator().manual_seed(0)
    turn = Turn([[5], [5, 6]], [[7], [8, 9]], [some_rows(1, generator), some_rows(rows, generator)])
    with pytest.raises(ValueError, match=rf"sample 1: the record has {rows} rows for 4 tokens"):
        stitch([turn], [[5], [5, 6]], [[7], [8, 9]], SHAPE)


def test_wrong_length_in_a_later_turn_names_the_sample_of_the_batch():
    first, second = two_turns()
    generator = torch.Generator().manual_seed(3)
    first = Turn([[4], [5, 6]], [[4], [7, 8]], [some_rows(1, generator), *first.records])
    second.records = [second.records[0][:-2]]
    with pytest.raises(ValueError, match="sample 1: the record has 4 rows for 7 tokens"):
        stitch([first, second], [[4], [5, 6]], [[4], [7, 8, 9, 10, 11]], SHAPE)


def test_bad_rows_name_the_sample():
    first, _ = two_turns()
    first.records[0][1, 2, 1] = first.records[0][1, 2, 0]
    with pytest.raises(ValueError, match="sample 0, decoder layer 3 .*row 1: expert"):
        stitch([first], [[5, 6]], [[7, 8]], SHAPE)


def test_turn_that_belongs_to_no_sample_is_refused():
    first, second = two_turns()
    second.prompt_ids = [[5, 6, 7, 18, 9]]
    with pytest.raises(ValueError, match="5 tokens"):
        stitch([first, second], [[5, 6]], [[7, 8, 9, 10, 11]], SHAPE)


def test_turns_are_joined_by_tokens():
    """Two samples with a tool between their turns, in another order; the last turn is cut."""
    one = Turn([[5, 6], [5, 7]], [[8, 9], [8, 1]], [], masks=[SamplingMask.of(some_kept(c)) for c in ([8, 9], [8, 1])])
    later = [12, 13, 14]
    two = Turn([[5, 6, 8, 9, 40, 41]], [later], [], masks=[SamplingMask.of(some_kept(later))])
    for turns in ([one, two], [two, one]):
        record = stitch(turns, [[5, 6], [5, 7]], [[8, 9, 40, 41, 12, 13], [8, 1]], None)
        first, second = (kept_rows(mask) for mask in record.masks)
        assert first == [*some_kept([8, 9]), [], [], *some_kept(later)[:2]]
        assert second == some_kept([8, 1])
        assert [len(each) for each in record.records] == [0, 0]
    one.masks = None
    assert stitch([one, two], [[5, 6], [5, 7]], [[8, 9, 40, 41, 12, 13], [8, 1]], None).masks is None


def test_turn_of_which_no_routes_were_recorded():
    """As with R2, whose rollouts are not asked for any: its rows are missing, those of others stay where they are."""
    first, second = two_turns()
    rows = stitch([first, second], [[5, 6]], [[7, 8, 9, 10, 11]], SHAPE).records[0]
    for without, missing in ((first, slice(0, len(first.records[0]))), (second, slice(len(first.records[0]), None))):
        kept, without.records, without.logprobs = without.records, [], [torch.zeros(len(without.completion_ids[0]))]
        (record,) = stitch([first, second], [[5, 6]], [[7, 8, 9, 10, 11]], SHAPE).records
        assert missing_rows(record, SHAPE).nonzero()[:, 0].tolist() == list(range(len(rows)))[missing]
        there = ~missing_rows(record, SHAPE)
        assert there.any() and torch.equal(record[there], rows[there])
        without.records = kept


def test_a_row_without_its_token_is_an_error():
    turn = Turn([[5]], [[8, 9]], [], masks=[SamplingMask.of([[8], [3, 4]])])
    with pytest.raises(ValueError, match=r"sample 0: token 9 was sampled at position 1 of the completion"):
        stitch([turn], [[5]], [[8, 9]], None)
