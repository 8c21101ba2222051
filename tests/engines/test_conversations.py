"""Routes of conversations whose turns are rendered anew: each token has the row of the first turn that fed it.

The turns are joined by TRL's own builder, which decides between appending, overwriting the end, and a new sequence.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from engines.fake_vllm import npy_base64
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trl.experimental.async_grpo import async_rollout_worker
from trl.experimental.async_grpo.async_rollout_worker import TurnRecord, _chain_to_sequences

from trl_r3 import RoutingLayout
from trl_r3._compat import swapped
from trl_r3.engines import conversations
from trl_r3.engines.conversations import Conversation, ConversationRoutes, RoutedTokens
from trl_r3.engines.payloads import decode_vllm_http
from trl_r3.records.record import missing_rows
from trl_r3.trainers.async_worker import RoutedBuilder

SHAPE = RoutingLayout(moe_layers=(1, 2), num_decoder_layers=3, num_experts=200, top_k=2)
FORK_THRESHOLD = 4
few = settings(max_examples=150, deadline=None)
token = st.integers(0, 2)  # few different ones, so that sequences agree now and then


@st.composite
def rendered_turns(draw):
    """Prompts and completions of a conversation: a later prompt repeats what was fed, up to somewhere, and goes on."""
    turns, held = [], []
    for _ in range(draw(st.integers(1, 4))):
        drift = draw(st.sampled_from([0, 0, 1, 2, 3, 5, 9]))
        start = held[: max(len(held) - drift, 0)]
        prompt = start + draw(st.lists(token, min_size=0 if start else 1, max_size=4))
        completion = draw(st.lists(token, min_size=1, max_size=4))
        turns.append((prompt, completion))
        held = prompt + completion
    return turns


def told(number: int, count: int, first: int = 0) -> np.ndarray:
    """(count, D, K): rows that name turn and position, in every layer; that of the dense layer is anything."""
    rows = np.zeros((count, 3, 2), dtype=np.int16)
    rows[:, 1:, 0] = number
    rows[:, 1:, 1] = 10 + np.arange(first, first + count)[:, None]
    return rows


def answered(turns, leaves_out: bool = True) -> list[RoutedTokens]:
    """What a conversation makes of answers, of rows that it does not have, or of all."""
    conversation, outputs = Conversation(SHAPE), []
    for number, (prompt, completion) in enumerate(turns):
        left_out = conversation.rows_left_out(prompt) if leaves_out else 0
        rows = told(number, len(prompt) + len(completion) - 1 - left_out, left_out)
        rows = decode_vllm_http(npy_base64(rows))  # as they come
        outputs.append(conversation.add(prompt, completion, rows, (number, number + number % 2), number))
    return outputs


def by_builder(turns, outputs) -> list[tuple[list[int], ConversationRoutes]]:
    """Sequences of TRL's builder, each with its routes."""
    records = [TurnRecord(p, output, [0.0] * len(c)) for (p, c), output in zip(turns, outputs, strict=True)]
    with swapped(async_rollout_worker, "_SampleBuilder", RoutedBuilder):
        sequences, _ = _chain_to_sequences(records, "id", FORK_THRESHOLD)
    return [(each.input_ids, each.routes) for each in sequences]


def first_feeds(turns) -> list[list[int]]:
    """By turn and position, the turn that fed this token first, with all before it: found by counting prefixes."""
    owners: list[list[int]] = []
    for number, (prompt, completion) in enumerate(turns):
        tokens = prompt + completion
        before = turns[number - 1][0] + turns[number - 1][1] if number else []
        owner = []
        for position in range(len(tokens) - 1):
            fed_before = position < len(before) - 1 and position < len(prompt)
            same = fed_before and tokens[: position + 1] == before[: position + 1]
            owner.append(owners[-1][position] if same else number)
        owners.append(owner)
    return owners


def assert_right(turns, joined) -> None:
    expected: dict[tuple, list] = {}  # by tokens: of each turn that ends there
    for (prompt, completion), owner in zip(turns, first_feeds(turns), strict=True):
        expected.setdefault(tuple(prompt + completion), []).append(owner)
    for tokens, routes in joined:
        rows = routes.rows
        assert rows.shape == (len(tokens) - 1, 2, 2) and rows.dtype == torch.uint8
        assert rows[:, 0, 0].tolist() in expected[tuple(tokens)]
        assert rows[:, 1, 1].tolist() == [10 + position for position in range(len(tokens) - 1)]


@few
@given(rendered_turns(), st.booleans())
@example([([1, 2], [0, 1]), ([1, 2], [0])], True)  # asked again, and ended at once
def test_each_row_is_that_of_the_first_turn_that_fed_its_token(turns, leaves_out):
    outputs = answered(turns, leaves_out)
    assert_right(turns, [(prompt + c, output.routes) for (prompt, c), output in zip(turns, outputs, strict=True)])
    assert_right(turns, by_builder(turns, outputs))


@few
@given(rendered_turns())
@example([([1, 2], [0, 1])] * 2)  # two that are equal keep their own
def test_turns_that_know_of_no_conversation_are_joined_by_the_builder(turns):
    """As where a harness samples each turn on a thread: all rows come, and each answer stands for itself."""
    outputs = [
        Conversation(SHAPE).add(p, c, told(number, len(p) + len(c) - 1), (0, 0), number)
        for number, (p, c) in enumerate(turns)
    ]
    unseen = list(enumerate(turns))
    for tokens, routes in by_builder(turns, outputs):
        rows = routes.rows
        assert rows[:, 1, 1].tolist() == [10 + position for position in range(len(tokens) - 1)]
        ends = [(i, (p, c)) for i, (p, c) in unseen if p + c == tokens]
        own = [(i, (p, c)) for i, (p, c) in ends if rows[len(p) :, 0, 0].tolist() == [i] * (len(c) - 1)]
        assert own
        unseen.remove(own[0])


CLEAN = [([1, 1, 2], [2, 0]), ([1, 1, 2, 2, 0, 1, 1], [2, 2])]
REALIGN = [([1, 1, 2], [2, 0, 0, 1]), ([1, 1, 2, 2, 0, 1, 1, 2], [2, 2])]
FORK = [([1, 1, 2], [2, 0, 0, 1, 1, 1, 1, 1]), ([1, 1, 2, 2, 1], [0, 2])]


@pytest.mark.parametrize(
    ("turns", "owners"),
    [
        (CLEAN, [[0, 0, 0, 0, 1, 1, 1, 1]]),
        (REALIGN, [[0, 0, 0, 0, 0, 1, 1, 1, 1]]),
        (FORK, [[0] * 10, [0, 0, 0, 0, 1, 1]]),
    ],
    ids=["clean", "realign", "fork"],
)
def test_the_three_kinds_of_a_turn(turns, owners):
    joined = by_builder(turns, answered(turns))
    assert [routes.rows[:, 0, 0].tolist() for _, routes in joined] == owners


def wrong_last_turn(self, matched, turn):
    return turn


def wrong_realigned_tail(self, matched, turn):
    kept = len(self)  # whatever the turn rendered anew
    return ConversationRoutes((*self._cut(0, kept), *turn._cut(kept, len(turn))))


@pytest.mark.parametrize("wrong", [wrong_last_turn, wrong_realigned_tail])
def test_wrong_ways_to_join_are_seen(monkeypatch, wrong):
    monkeypatch.setattr(ConversationRoutes, "go_on", wrong)
    outputs = [
        Conversation(SHAPE).add(p, c, told(number, len(p) + len(c) - 1), (0, 0), number)
        for number, (p, c) in enumerate(REALIGN)
    ]
    with pytest.raises(AssertionError):
        assert_right(REALIGN, by_builder(REALIGN, outputs))


def test_a_prompt_begin_that_counts_the_token_which_was_never_fed_is_seen(monkeypatch):
    def wrong(self, prompt):
        return conversations.common_prefix(self.tokens, prompt)

    monkeypatch.setattr(Conversation, "known_rows", wrong)
    outputs = answered(CLEAN)
    with pytest.raises(AssertionError):
        assert_right(CLEAN, [(p + c, output.routes) for (p, c), output in zip(CLEAN, outputs, strict=True)])


def test_versions_are_those_of_the_request_that_told_the_row():
    routes = answered(CLEAN)[-1].routes
    assert routes.spans.tolist() == [[4, 0, 0], [4, 1, 2]]
    assert [piece.rows.shape[0] for piece in routes.pieces] == [4, 4]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, None),
        (ValueError("no base64"), "no base64"),
        (told(0, 3), "sample 7: the server returned 3 rows of routes for 5 tokens, expected 4:"),
        (told(0, 5), "sample 7: the server returned 5 rows of routes for 5 tokens, expected 4:"),
        (told(0, 4)[:, :, [0, 0]] + 1, "sample 7, decoder layer 1 .* expert 1 appears 2 times"),
        (told(0, 4) + 195, r"expert id 20\d is outside \[0, 200\)"),
        (told(0, 4)[:, :1], "1 layer slots"),
    ],
    ids=["none", "no base64", "short", "long", "twice", "outside", "layers"],
)
def test_what_is_wrong_with_an_answer_is_kept_not_raised(answer, words):
    conversation = Conversation(SHAPE)
    routes = conversation.add([1, 1, 2], [2, 0], answer, (0, 0), 7).routes
    assert len(routes) == 4 and bool(missing_rows(routes.rows, SHAPE).all())
    if words is None:
        assert routes.fault is None
    else:
        with pytest.raises(ValueError, match=words):
            raise ValueError(routes.fault)
    later = conversation.add([1, 1, 2, 2, 0, 1], [2], told(1, 6), (0, 0), 8).routes
    assert later.fault == routes.fault
    assert missing_rows(later.rows, SHAPE).tolist() == [True] * 4 + [False] * 2
    later = Conversation(SHAPE).add([1], [1, 1], told(0, 2), (0, 0), 9).routes.go_on(1, routes)
    assert later.fault == routes.fault


def test_memory_and_wire_grow_with_tokens_not_with_turns():
    turns = [([1] * (10 * n + 1), [1] * 9) for n in range(20)]
    conversation, wire, outputs = Conversation(SHAPE), 0, []
    for number, (prompt, completion) in enumerate(turns):
        known = conversation.known_rows(prompt)
        wire += len(prompt) + len(completion) - 1 - known
        rows = told(number, len(prompt) + len(completion) - 1 - known, 0)
        outputs.append(conversation.add(prompt, completion, rows, (0, 0), number))
    total = len(turns[-1][0]) + len(turns[-1][1]) - 1
    assert wire == total
    storages = {
        p.rows.untyped_storage().data_ptr(): p.rows.untyped_storage() for o in outputs for p in o.routes.pieces
    }
    assert sum(len(storage) for storage in storages.values()) == total * 4


def test_tokens_are_a_list_for_everybody_else():
    output = answered(CLEAN)[0]
    assert output == [2, 0] and [1, *output] == [1, 2, 0]
    again = pickle.loads(pickle.dumps(output.routes))
    assert torch.equal(again.rows, output.routes.rows)
