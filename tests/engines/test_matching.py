"""Which sample a turn continues, where tokens alone hardly tell: against the record of each sample, made by hand.

Legend: T tokens of a sequence, L MoE layers, K experts per token.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trl_r3 import RoutingLayout, Turn, stitch
from trl_r3.engines import turns as turns_module
from trl_r3.engines.matching import _cheapest
from trl_r3.records.record import missing_rows

SHAPE = RoutingLayout(moe_layers=(0, 2), num_decoder_layers=3, num_experts=200, top_k=2)


def has_missing(joined):
    """Whether any row of any sample is missing."""
    return any(bool(missing_rows(record, SHAPE).any()) for record in joined.records)


END = 9  # closes what a model says, and is said by nobody else
many = settings(max_examples=300, deadline=None)


def rows_of(history, count):
    """(count, L, K): row p is told by `history(p)`."""
    rows = []
    for position in range(count):
        chance = random.Random(repr(history(position)))
        rows.append([chance.sample(range(200), 2) for _ in SHAPE.moe_layers])
    return torch.tensor(rows, dtype=torch.uint8).reshape(count, 2, 2)


@dataclass
class Conversation:
    """A sample: its prompt, and by turn what it heard before and what it said."""

    prompt: list[int]
    turns: list[tuple[list[int], list[int]]]
    cut: int = 0  # tokens that the trainer cuts off
    name: int = 0

    def fed(self, number):
        """What a turn was given."""
        return self.prompt + [t for heard, said in self.turns[:number] for t in heard + said] + self.turns[number][0]

    @property
    def completion(self):
        whole = [t for heard, said in self.turns for t in heard + said]
        return whole[: len(whole) - self.cut]

    @property
    def tokens(self):
        return self.prompt + self.completion

    def entry(self, number, by_name):
        """Prompt, completion, record and log-probabilities of a turn."""
        prompt, said = self.fed(number), self.turns[number][1]
        told = [*prompt, *said]
        record = rows_of(lambda p: (self.name, number, p) if by_name else told[: p + 1], len(told) - 1)
        return prompt, said, record, torch.arange(len(said)) + float(len(prompt))

    def record(self, by_name):
        """The record that has to come out: of each token, the row of the turn that fed it first."""
        first = {}
        for number in range(len(self.turns)):
            for position in range(len(self.fed(number)) + len(self.turns[number][1]) - 1):
                first.setdefault(position, number)
        told = self.tokens
        return rows_of(lambda p: (self.name, first[p], p) if by_name else told[: p + 1], len(told) - 1)


def played(order, conversations, by_name):
    """Turns as they were made: `order` holds the (sample, number) of each entry of each turn."""
    turns = []
    for entries in order:
        made = [conversations[sample].entry(number, by_name) for sample, number in entries]
        turns.append(Turn(*([list(part) for part in zip(*made, strict=True)])))
    return turns


def as_trl_does(conversations):
    """All that go on, in order, turn by turn."""
    longest = max(len(each.turns) for each in conversations)
    return [[(s, n) for s, each in enumerate(conversations) if len(each.turns) > n] for n in range(longest)]


def one_after_the_other(conversations):
    return [[(s, n)] for s, each in enumerate(conversations) for n in range(len(each.turns))]


ORDERS = [as_trl_does, one_after_the_other]


def stitched(turns, conversations):
    return stitch(turns, [each.prompt for each in conversations], [each.completion for each in conversations], SHAPE)


tokens = st.lists(st.integers(2, 3), min_size=1, max_size=3)  # two different ones, so that samples look alike
ended = tokens.map(lambda said: [*said, END])


@st.composite
def conversations_of(draw, said=tokens, cuts="last"):
    drawn = []
    for name in range(draw(st.integers(1, 5))):
        if drawn and draw(st.booleans()):  # another completion of the same prompt, or a twin
            other = draw(st.sampled_from(drawn))
            prompt, turns = list(other.prompt), list(other.turns[: draw(st.integers(0, len(other.turns)))])
        else:
            prompt, turns = draw(tokens), []
        for number in range(len(turns), max(len(turns), draw(st.integers(1, 3)))):
            turns.append((draw(tokens) if number else [], draw(said)))
        room = {"none": 0, "last": len(turns[-1][1]) - (len(turns) == 1), "any": sum(map(len, sum(turns, ()))) - 1}
        drawn.append(Conversation(prompt, turns, draw(st.integers(0, room[cuts])), name))
    return drawn


TWO_FIT = [  # the last turn of sample 2 begins with all of sample 1 too, and comes before it
    Conversation([2], [([], [2])], name=0),
    Conversation([2, 2], [([], [2])], name=1),
    Conversation([2], [([], [2]), ([2], [3])], cut=1, name=2),
]
TWINS = [Conversation([5], [([], [7]), ([8], [6])], name=name) for name in range(3)]


@pytest.mark.parametrize("order", ORDERS)
@many
@given(conversations_of())
@example(TWO_FIT)
@example(TWINS)
def test_every_sample_has_its_own_rows(order, conversations):
    """Also beside samples of the same tokens, whose rows in these records are others."""
    joined = stitched(played(order(conversations), conversations, by_name=True), conversations)
    for each, record, logprobs in zip(conversations, joined.records, joined.logprobs, strict=True):
        assert torch.equal(record, each.record(by_name=True)), f"sample {each.name}"
        said = sum(len(said) for _, said in each.turns) - each.cut
        assert int((~logprobs.isnan()).sum()) == said


@many
@given(conversations_of(said=ended, cuts="none"), st.randoms(use_true_random=False))
@example(TWINS, random.Random(0))
def test_samples_played_in_any_order(conversations, chance):
    """Each at its own pace. Which of two twins a turn is of cannot be told, but all rows are of their tokens."""
    pace = [s for s, each in enumerate(conversations) for _ in each.turns]
    chance.shuffle(pace)
    order = [[(s, pace[:i].count(s))] for i, s in enumerate(pace)]
    joined = stitched(played(order, conversations, by_name=False), conversations)
    for each, record in zip(conversations, joined.records, strict=True):
        assert torch.equal(record, each.record(by_name=False))
    # none was lost to a sample that had one already
    scored = sum(int((~logprobs.isnan()).sum()) for logprobs in joined.logprobs)
    assert scored == sum(len(said) for each in conversations for _, said in each.turns)


BEGINS_ALIKE = [  # what is left of sample 0 begins both prompts of the second turn
    Conversation([2], [([], [2]), ([3], [2])], cut=2, name=0),
    Conversation([2], [([], [2]), ([2], [3])], name=1),
]


@pytest.mark.parametrize("order", ORDERS)
@many
@given(conversations_of(said=ended, cuts="any"))
@example(BEGINS_ALIKE)
def test_samples_that_are_cut_in_any_turn(order, conversations):
    """Turns behind the cut are of no row. Of two samples that begin alike either may have them, if none is lost."""
    joined = stitched(played(order(conversations), conversations, by_name=False), conversations)
    for each, record in zip(conversations, joined.records, strict=True):
        assert torch.equal(record, each.record(by_name=False)), f"sample {each.name}"


@pytest.mark.parametrize(
    "order, conversations",
    [(as_trl_does, TWO_FIT), (one_after_the_other, TWINS)],
    ids=["prompt of two samples", "one after the other"],
)
def test_by_position_and_first_fit_rows_are_missing(order, conversations, monkeypatch):
    """What these cases are for: the first turn by position, later ones in order to the first that fits."""
    turns = played(order(conversations), conversations, by_name=True)
    assert not has_missing(stitched(turns, conversations))

    def first_fit(turn, samples):
        if turn is turns[0]:
            return list(range(len(turn.records)))
        found, start = [], 0
        for prompt in turn.prompt_ids:
            fits = (s for s in range(start, len(samples)) if samples[s].ids[: len(prompt)] == prompt)
            found.append(next(fits))
            start = found[-1] + 1
        return found

    monkeypatch.setattr(turns_module, "_samples_of", first_fit)
    assert has_missing(stitched(turns, conversations))


@dataclass
class Case:
    """Entries of one turn, (prompt, completion), and the sample that each should go to."""

    sequences: list[list[int]]
    entries: list[tuple[list[int], list[int]]]
    samples: list[int]
    filled: list[int] = field(default_factory=list)


CASES = {
    "an entry leaves the only sample that fits the next": Case(
        [[2, 2, 9], [2, 2, 3]], [([2], [2]), ([2, 2], [9]), ([2, 2], [3])][:2], [1, 0]
    ),
    "a chain of entries moves up": Case(
        [[2, 3, 4], [2, 3, 4, 5], [2, 3, 4, 5, 6], [7]],
        [([2], [3]), ([2, 3], [4]), ([2, 3, 4, 5], [6])],
        [0, 1, 2],
    ),
    "tokens that agree come before the own index": Case([[2, 3], [2, 4]], [([2], [4]), ([2], [3])], [1, 0]),
    "tokens that agree come before an order": Case([[2, 3], [2, 4], [9]], [([2], [4]), ([2], [3])], [1, 0]),
    "a sample that lacks rows comes first": Case([[2, 3], [2, 3]], [([2], [3])], [1], filled=[0]),
    "the lowest index otherwise": Case([[8], [2, 3], [2, 3]], [([2], [3])], [1]),
    "the order of the samples otherwise": Case([[2, 3]] * 4, [([2], [3])] * 3, [0, 1, 2]),
    "an edited completion keeps its sample": Case([[2, 3], [2, 4]], [([2], [7]), ([2], [4])], [0, 1]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_which_sample(case):
    turns = []
    for sample in case.filled:
        ids = case.sequences[sample]
        turns.append(Turn([ids[:1]], [ids[1:]], [rows_of(lambda p: "before", len(ids) - 1)]))
    samples = [turns_module._Stitched(ids[:1], ids[1:], SHAPE) for ids in case.sequences]
    for sample, turn in zip(case.filled, turns, strict=True):
        samples[sample].add(turn, 0)
    prompts, said = (list(part) for part in zip(*case.entries, strict=True))
    records = [rows_of(lambda p: "now", len(p) + len(s) - 1) for p, s in case.entries]
    assert turns_module._samples_of(Turn(prompts, said, records), samples) == case.samples


@given(
    st.integers(1, 5).flatmap(
        lambda samples: st.lists(
            st.dictionaries(st.integers(0, samples - 1), st.integers(0, 20), max_size=samples), max_size=samples
        )
    )
)
@many
def test_the_matching_is_the_cheapest(prices):
    """Against all matchings, tried one by one."""

    def all_of(entry, taken):
        if entry == len(prices):
            yield 0, 0
            return
        for size, cost in all_of(entry + 1, taken):
            yield size, cost
        for sample, price in prices[entry].items():
            if sample not in taken:
                for size, cost in all_of(entry + 1, taken | {sample}):
                    yield size - 1, cost + price

    chosen = _cheapest(prices)
    assert len(set(chosen.values())) == len(chosen)
    most = min(all_of(0, frozenset()))[0]
    assert -len(chosen) == most
    if -most == len(prices):
        assert sum(prices[entry][sample] for entry, sample in chosen.items()) == min(all_of(0, frozenset()))[1]


def test_two_entries_of_one_sample_are_refused():
    """Entries of a turn are different sequences; a sample cannot be continued twice at once."""
    turn = Turn([[2], [2]], [[3], [3]], [rows_of(lambda p: p, 1)] * 2)
    with pytest.raises(ValueError, match="1 tokens that is the beginning of none of the 1 sequences, but for 1 that"):
        stitch([turn], [[2]], [[3]], SHAPE)
