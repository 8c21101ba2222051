"""Whose row is replayed where: a model whose routers encode the token id tells (property 11)."""

from __future__ import annotations

import itertools
import random
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_zoo import build_tiny
from oracles import as_sets, changed_rows, stacked

from trl_r3 import RouterReplay, Turn, enable_routing_replay, stitch
from trl_r3.cli.experts import executed_ids
from trl_r3.engines.turns import RolloutRecord
from trl_r3.records.checks import MisalignedRecordError
from trl_r3.records.record import align, missing_rows, pack, slice_samples, unpack
from trl_r3.records.samples import Sample, ScoredBatch

VOCAB, EXPERTS, TOP_K, LAYERS = 32, 16, 3, (1, 3)
_SETS = list(itertools.combinations(range(EXPERTS), TOP_K))
random.Random(0).shuffle(_SETS)


def table(first):
    """`(V, L, K)`: a set of experts for each token and layer, no two of them the same."""
    return torch.tensor(_SETS[first : first + VOCAB * len(LAYERS)]).reshape(VOCAB, len(LAYERS), TOP_K)


OF_ROLLOUT, OF_TRAINING = table(0), table(VOCAB * len(LAYERS))


@torch.no_grad()
def oracle(choice):
    """A Qwen3-MoE that routes token v in MoE layer l to `choice[v, l]`, whatever surrounds it."""
    model = build_tiny(
        "qwen3_moe",
        vocab_size=VOCAB,
        num_hidden_layers=4,
        mlp_only_layers=[0, 2],
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    model.model.embed_tokens.weight.copy_(torch.eye(VOCAB))  # and no layer adds anything to it
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "mlp.down_proj.weight", "experts.down_proj")):
            p.zero_()
    for slot, layer in enumerate(LAYERS):
        preferred = torch.zeros(VOCAB, EXPERTS).scatter(1, choice[:, slot], torch.tensor([[3.0, 2.0, 1.0]] * VOCAB))
        model.model.layers[layer].mlp.gate.weight.copy_(preferred.T)
    return model


class Pair(tuple):
    """A handle and its model; a failing example need not print the model."""

    def __repr__(self):
        return f"Pair({self[0]})"


@pytest.fixture(scope="module")
def rollout():
    return Pair((RouterReplay(model := oracle(OF_ROLLOUT)), model))


@pytest.fixture(scope="module")
def training():
    """What is trained has other weights, so that no token would go live where it went in the rollout."""
    assert changed_rows(OF_ROLLOUT, OF_TRAINING).all()
    return Pair((RouterReplay(model := oracle(OF_TRAINING)), model))


settings.register_profile("models", max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
with_models = settings(settings.get_profile("models"))

tokens_of = st.lists(st.integers(1, VOCAB - 2), min_size=1, max_size=6)
samples = st.lists(st.tuples(tokens_of, tokens_of), min_size=1, max_size=6)


@torch.no_grad()
def engine(rollout, tokens):
    """What an engine returns for one sequence: packed rows of all tokens but the last."""
    replay, model = rollout
    with replay.record() as recorded:
        model(torch.tensor([tokens]))
    return pack(recorded.routed_experts[0, :-1], replay.layout)


def pad(drawn, prompt_width, width):
    """Left-padded prompts, right-padded completions: ids, mask, and where a row was recorded."""
    ids, mask = (torch.zeros(len(drawn), width, dtype=torch.long) for _ in range(2))
    recorded = torch.zeros(len(drawn), width, dtype=torch.bool)
    for i, (prompt, completion) in enumerate(drawn):
        start, end = prompt_width - len(prompt), prompt_width + len(completion)
        ids[i, start:end] = torch.tensor(prompt + completion)
        mask[i, start:end] = 1
        recorded[i, start : end - 1] = True
    return ids, mask, recorded


def wrong_rows(executed, ids, recorded):
    """How many (token, layer) pairs did not run through the experts of their own token."""
    expected = torch.where(recorded[..., None, None], OF_ROLLOUT[ids], OF_TRAINING[ids])
    return int(changed_rows(executed, expected).sum())


@torch.no_grad()
def replayed(training, record, ids, mask=None, **kwargs):
    replay, model = training
    with executed_ids(model) as seen, replay.replay(record):
        model(ids, attention_mask=mask, **kwargs)
    return stacked(seen, ids.shape[0])


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


def samples_of(drawn, records):
    return [
        Sample(i, torch.tensor([*prompt, *completion]), len(prompt), record)
        for i, ((prompt, completion), record) in enumerate(zip(drawn, records, strict=True))
    ]


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


@with_models
@given(drawn=samples, returned=st.integers(1, 2), seed=st.integers(0, 3))
def test_generate(drawn, returned, seed):
    model = oracle(OF_ROLLOUT)
    enable_routing_replay(model)
    prompts = [(prompt, []) for prompt, _ in drawn]
    width = max(len(prompt) for prompt, _ in prompts)
    ids, mask, _ = pad(prompts, width, width)
    torch.manual_seed(seed)
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        max_new_tokens=6,
        num_return_sequences=returned,
        eos_token_id=[1, 2, 3, 4],
        temperature=5.0,
        return_dict_in_generate=True,
        output_routed_experts=True,
    )
    expected = OF_ROLLOUT[out.sequences].clone()
    for i, sequence in enumerate(out.sequences):
        start = width - len(prompts[i // returned][0])
        ends = [p for p in range(width, len(sequence)) if int(sequence[p]) in (1, 2, 3, 4)]
        last = ends[0] if ends else len(sequence) - 1
        expected[i, :start] = expected[i, last:] = -1
    assert torch.equal(as_sets(out.routed_experts), as_sets(expected))
