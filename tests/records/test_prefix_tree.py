"""Records of samples laid onto a tree of prefixes, against rows that are looked up by prefix."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_r3 import RoutingLayout
from trl_r3.records import prefix_tree
from trl_r3.records.prefix_tree import TreeRecord, TreeSample

SHAPE = RoutingLayout(moe_layers=(0, 1), num_decoder_layers=2, num_experts=100, top_k=2)
MISSING = SHAPE.missing
few = settings(max_examples=200, deadline=None)
END = -1


@dataclasses.dataclass
class Drawn:
    """A sample before it is packed."""

    tokens: list[int]
    record: np.ndarray
    versions: np.ndarray
    counts: np.ndarray
    goes_live: np.ndarray


@st.composite
def some_samples(draw):
    drawn = []
    for _ in range(draw(st.integers(1, 5))):
        tokens = draw(st.lists(st.integers(0, 1), min_size=1, max_size=7))
        rows = len(tokens) - 1
        flags = st.lists(st.booleans(), min_size=rows, max_size=rows)
        seed = draw(st.integers(0, 3))  # equal now and then
        first = np.random.default_rng(seed).integers(0, 50, (rows, 2, 1))
        record = np.concatenate([first, first + 50], 2)
        if draw(st.booleans()):
            record = record[:, :, ::-1].copy()  # the same sets
        record[np.array(draw(flags), dtype=bool)] = MISSING
        versions = np.array(draw(st.lists(st.sampled_from([-1, 3, 3, 3, 4]), min_size=rows, max_size=rows)), dtype=int)
        counts = np.array([False, *draw(flags)])
        goes_live = np.array(draw(flags), dtype=bool) & draw(st.booleans())
        drawn.append(Drawn(tokens, record.astype(np.uint8), versions, counts, goes_live))
    return drawn


def nodes_of(tokens):
    """Names of the nodes of a sample: the tokens up to there, and the next one."""
    return [(*tokens[: i + 1], tokens[i + 1] if i + 1 < len(tokens) else END) for i in range(len(tokens))]


def packed(drawn):
    """Samples with their paths, and the order of the nodes: depth first, children in any order."""
    nodes = list(dict.fromkeys(node for each in drawn for node in nodes_of(each.tokens)))
    order = sorted(nodes, key=lambda node: ([token + 10 for token in node[:-1]], node[-1]))
    # depth first: a node stands before all that go on from it
    order = depth_first(order)
    at = {node: i for i, node in enumerate(order)}
    samples = [
        TreeSample(
            10 + i,
            np.array([at[node] for node in nodes_of(each.tokens)]),
            each.record,
            each.versions,
            each.counts,
            each.goes_live,
        )
        for i, each in enumerate(drawn)
    ]
    return samples, order


def depth_first(nodes):
    def walk(before):
        for node in [n for n in nodes if len(n) == len(before) + 1 and n[: len(before)] == before]:
            yield node
            if node[-1] != END:
                yield from walk(node)

    return list(walk_roots(nodes, walk))


def walk_roots(nodes, walk):
    for root in [n for n in nodes if len(n) == 2]:
        yield root
        if root[-1] != END:
            yield from walk(root)


def expected_rows(drawn, order):
    """By node: the first sample that has it and a row there, which does not go live, by looking at each."""
    found = []
    for node in order:
        depth, owner = len(node) - 2, None
        for i, each in enumerate(drawn):
            names = nodes_of(each.tokens)
            if node in names and depth < len(each.record):
                is_missing = each.record[depth, 0, 0] == MISSING or each.goes_live[depth]
                if owner is None and not is_missing:
                    owner = i
        found.append((owner, depth))
    return found


def check(drawn) -> None:
    samples, order = packed(drawn)
    tree = TreeRecord.of(samples, len(order), SHAPE)
    found = expected_rows(drawn, order)
    rows = [drawn[o].record[d] if o is not None else np.full((2, 2), MISSING) for o, d in found]
    assert np.array_equal(tree.rows.numpy(), np.array(rows).reshape(-1, 2, 2))
    assert tree.rows.dtype == torch.uint8
    assert tree.owners.tolist() == [-1 if o is None else 10 + o for o, _ in found]

    version = {node: -1 if o is None else int(drawn[o].versions[d]) for node, (o, d) in zip(order, found, strict=True)}
    for node, got in zip(order, tree.versions.tolist(), strict=True):
        path = nodes_of(list(node[:-1]))[:-1] + [node]  # all before it go on with its tokens
        of_path = {version[each] for each in path}
        assert got == (of_path.pop() if len(of_path) == 1 else -1)

    matters, shared, conflicts, live = set(), 0, 0, set()
    for i, each in enumerate(drawn):
        names = nodes_of(each.tokens)
        targets = [p for p in range(1, len(each.tokens)) if each.counts[p]]
        matters |= set(names[: max(targets)]) if targets else set()
        for d in range(len(each.record)):
            owner, _ = found[order.index(names[d])]
            live |= {names[d]} if each.goes_live[d] else set()
            if each.record[d, 0, 0] == MISSING or each.goes_live[d] or owner == i:
                continue
            shared += 1
            conflicts += any(set(a) != set(b) for a, b in zip(each.record[d], drawn[owner].record[d], strict=True))
    lacking = {node for node, (owner, _) in zip(order, found, strict=True) if owner is None}
    assert (tree.matters, tree.missing) == (len(matters), len(matters & lacking))
    assert (tree.live, tree.shared, tree.conflicts) == (len(matters & lacking & live), shared, conflicts)


@few
@given(some_samples())
def test_rows_by_prefix(drawn):
    check(drawn)


def sample(tokens, first, **changes):
    rows = len(tokens) - 1
    record = np.stack([np.arange(first, first + rows), np.arange(first + 50, first + 50 + rows)], 1)
    record = np.repeat(record[:, None], 2, 1).astype(np.uint8)
    values = {"versions": np.full(rows, 3), "counts": np.arange(len(tokens)) > 1, "goes_live": np.zeros(rows, bool)}
    return Drawn(tokens, record, **{**values, **changes})


TWINS = [sample([0, 1, 1, 0, 1], 0), sample([0, 1, 1, 1, 1], 20), sample([0, 1, 1, 0, 1], 40)]


def test_equal_samples_share_all_their_nodes():
    samples, order = packed(TWINS)
    tree = TreeRecord.of(samples, len(order), SHAPE)
    # a token is shared where the next one is, too, and the last token of a sample with that of an equal one
    assert len(order) == 5 + 3
    assert (tree.shared, tree.conflicts) == (2 + 4, 2 + 4)
    same = [TWINS[0], dataclasses.replace(TWINS[2], record=TWINS[0].record[:, :, ::-1].copy())]
    samples, order = packed(same)
    tree = TreeRecord.of(samples, len(order), SHAPE)
    assert (len(order), tree.shared, tree.conflicts) == (5, 4, 0)


def test_wrong_ways_to_lay_records_are_seen(monkeypatch):
    check(TWINS)
    right = TreeRecord.of

    def unordered(samples, num_tokens, layout):
        """Rows by node, not where the node was packed."""
        numbers = {}
        for each in samples:
            for at in each.path:
                numbers.setdefault(int(at), len(numbers))
        moved = [dataclasses.replace(s, path=np.array([numbers[int(at)] for at in s.path])) for s in samples]
        return right(moved, num_tokens, layout)

    def last_wins(samples, num_tokens, layout):
        return right(samples[::-1], num_tokens, layout)

    def moved(samples, num_tokens, layout):
        """Each row at the token that it predicts."""
        return right([dataclasses.replace(s, path=np.roll(s.path, -1)) for s in samples], num_tokens, layout)

    for wrong in (unordered, last_wins, moved):
        monkeypatch.setattr(prefix_tree.TreeRecord, "of", staticmethod(wrong))
        # depth first, the second sample stands before the last token of the first
        with pytest.raises(AssertionError):
            check([TWINS[0], sample([0, 1, 1, 0, 0, 1], 20), sample([0, 0], 60)])


def test_an_id_of_two_bytes():
    wide = dataclasses.replace(SHAPE, num_experts=300)
    rows = np.array([[[299, 1], [2, 3]], [[-1, -1], [-1, -1]]], dtype=np.int16)
    one = TreeSample(0, np.arange(3), rows, np.zeros(2, int), np.array([False, True, True]), np.zeros(2, bool))
    tree = TreeRecord.of([one], 3, wide)
    assert tree.rows.dtype == torch.int16
    assert tree.rows[:, 0, 0].tolist() == [299, -1, -1]
    assert (tree.matters, tree.missing, tree.live) == (2, 1, 0)
