"""Turns of a model whose routers encode the token id: each row of a joined record is that of its token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import as_sets
from token_oracle import OF_ROLLOUT, OF_TRAINING, VOCAB, engine, pad, replayed, tokens_of, with_models, wrong_rows

from trl_r3 import Turn, stitch
from trl_r3.engines.turns import RolloutRecord
from trl_r3.records.record import align, missing_rows, pack, unpack

TOOL = VOCAB - 1  # what a tool says begins with it, and no model samples it
turns_of = st.lists(st.tuples(tokens_of.map(lambda said: [TOOL, *said]), tokens_of), max_size=3)


@with_models
@given(
    conversations=st.lists(st.tuples(tokens_of, tokens_of, turns_of), min_size=1, max_size=4),
    cut=st.integers(0, 5),
)
def test_tool_turns(rollout, training, conversations, cut):
    """Each turn prefills the conversation anew. What is cut off the last turn is cut off its record."""
    layout = training[0].layout
    drawn, turns = [], []
    for prompt, answer, rest in conversations:
        completion = answer + [token for said, sampled in rest for token in said + sampled]
        last = rest[-1][1] if rest else answer
        drawn.append((prompt, completion[: len(completion) - min(cut, len(last) - 1)]))
    for number in range(1 + max(len(rest) for _, _, rest in conversations)):
        prompts, sampled = [], []
        for prompt, answer, rest in conversations:
            if number > len(rest):
                continue
            history = prompt + [t for part in [([], answer), *rest][:number] for t in part[0] + part[1]]
            said, new = ([], answer) if number == 0 else rest[number - 1]
            prompts.append(history + said)
            sampled.append(new)
        records = [engine(rollout, p + c) for p, c in zip(prompts, sampled, strict=True)]
        turns.append(Turn(prompts, sampled, records))
    joined = stitch(turns, [p for p, _ in drawn], [c for _, c in drawn], layout)
    assert isinstance(joined, RolloutRecord)
    assert not any(missing_rows(record, layout).any() for record in joined.records)
    assert [len(record) for record in joined.records] == [len(p) + len(c) - 1 for p, c in drawn]
    prompt_width = max(len(p) for p, _ in drawn)
    ids, mask, recorded = pad(drawn, prompt_width, prompt_width + max(len(c) for _, c in drawn))
    record = unpack(align(joined.records, joined.prompt_lengths, prompt_width, ids.shape[1], layout), layout)
    assert wrong_rows(replayed(training, record, ids, mask), ids, recorded) == 0


def test_earliest_turn_wins_and_the_next_fills_the_boundary(rollout, training):
    """What a later turn prefills was already routed by the turn that sampled it."""
    layout = training[0].layout
    first, said, second = [5, 6, 7], [8, 9], [10, 11]
    routed_later = pack(OF_TRAINING[torch.tensor([1, 2, *first, *said, *second])][:-1], layout)
    turns = [
        Turn([[1, 2]], [first], [engine(rollout, [1, 2, *first])]),
        Turn([[1, 2, *first, *said]], [second], [routed_later]),
    ]
    joined = stitch(turns, [[1, 2]], [[*first, *said, *second]], layout)
    rows = unpack(joined.records[0], layout)
    tokens = torch.tensor([1, 2, *first, *said, *second])
    expected = torch.cat([OF_ROLLOUT[tokens[:4]], OF_TRAINING[tokens[4:-1]]])
    assert torch.equal(as_sets(rows), as_sets(expected))
    # without the second turn its rows are missing, and nothing else is put there
    rows = unpack(stitch(turns[:1], [[1, 2]], [[*first, *said, *second]], layout).records[0], layout)
    assert torch.equal(as_sets(rows[:4]), as_sets(OF_ROLLOUT[tokens[:4]]))
    assert (rows[4:] == -1).all() and len(rows) == len(tokens) - 1


def test_turn_of_no_sample_is_refused(rollout, training):
    layout = training[0].layout
    turns = [
        Turn([[1, 2]], [[3]], [engine(rollout, [1, 2, 3])]),
        Turn([[1, 9, 3, 4]], [[5]], [engine(rollout, [1, 9, 3, 4, 5])]),
    ]
    with pytest.raises(ValueError, match="a prompt of 4 tokens that is the beginning of none"):
        stitch(turns, [[1, 2]], [[3, 4, 5]], layout)
    short = [Turn([[1, 2]], [[3, 4]], [engine(rollout, [1, 2])])]
    with pytest.raises(ValueError, match="sample 0: the record has 1 rows for 4 tokens"):
        stitch(short, [[1, 2]], [[3, 4]], layout)
