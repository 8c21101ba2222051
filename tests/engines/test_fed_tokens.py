"""
What `generate()` feeds beside real tokens goes to no expert, and the rollout is the one that it is without that; what
it only fills up was not drawn.

Legend: B sequences, P prompt tokens with padding, T tokens of the returned sequences, C of their completions.
"""

from __future__ import annotations

import pytest
import torch
from engines.tiny_chat import EOS, PAD, conversations, make_tokenizer, make_trainer, tiny_qwen3_moe
from oracles import give_forward, kept_rows
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from trl_r3 import RouterReplay
from trl_r3.cli.experts import experts_of
from trl_r3.engines.fed_tokens import FedTokens, recorded_as_fed
from trl_r3.engines.generate import drawn_tokens, end_tokens, generate_with_routes

LENGTHS, WIDTH, NEW = (3, 7, 1, 5), 7, 12
MASK = torch.tensor([[0] * (WIDTH - length) + [1] * length for length in LENGTHS])
IDS = ((torch.arange(4 * WIDTH).view(4, WIDTH) * 7 + 3) % 100 + 10) * MASK
ENDS = list(range(30, 60))  # a quarter of the vocabulary, so that sequences end early


def rows_of_calls(model, layer=0):
    """How many rows the experts of a layer compute in each call."""
    rows = []

    def forward(own, hidden, *args, **kwargs):
        rows.append(hidden.flatten(0, -2).shape[0])
        return own(hidden, *args, **kwargs)

    give_forward(experts_of(model)[layer], forward)
    return rows


def rollout(padding, model=None, ends=None, **kwargs):
    """A rollout, and how many rows went to the experts in each forward."""
    model = model or tiny_qwen3_moe()
    rows = rows_of_calls(model)
    given = {"input_ids": IDS, "attention_mask": MASK, "do_sample": True, "max_new_tokens": NEW, "top_k": 0}
    given |= {"eos_token_id": ENDS, "pad_token_id": 0, **kwargs}
    with RouterReplay(model, padding=padding) as replay:
        rows.clear()  # of attaching
        torch.manual_seed(0)
        generated = generate_with_routes(model, replay, model.generate, (), given, temperature=1.0, ends=ends)
    return generated, rows


def lengths_of(sequences, ends=ENDS):
    """Completion tokens of each sequence, with the one that ends it."""
    is_end = torch.isin(sequences[:, WIDTH:], torch.tensor(ends))
    return torch.where(is_end.any(1), is_end.int().argmax(1) + 1, sequences.shape[1] - WIDTH).tolist()


def assert_same_rollout(one, other, lengths):
    assert torch.equal(one.sequences, other.sequences)
    for row, (prompt, completion) in enumerate(zip(LENGTHS, lengths, strict=True)):
        real = slice(WIDTH - prompt, WIDTH + completion - 1)
        assert torch.equal(one.records[row, real], other.records[row, real])
        mine, others = one.logprobs[row, :completion], other.logprobs[row, :completion]
        torch.testing.assert_close(mine, others, equal_nan=True)  # of padding


def test_the_rollout_is_that_of_all_rows():
    padded, all_rows = rollout("keep")
    compact, rows = rollout("auto")
    lengths = lengths_of(padded.sequences)
    assert len(set(lengths)) > 2 and max(lengths) > 3
    assert_same_rollout(compact, padded, lengths)
    assert all_rows == [4 * WIDTH, *[4] * (max(lengths) - 1)]
    # a token that ends a sequence is fed, and nothing follows from it
    expected = [sum(LENGTHS), *(sum(length > step for length in lengths) for step in range(1, max(lengths)))]
    assert rows == expected and sum(rows) < 0.8 * sum(all_rows)


def test_sequences_that_end_too_early_would_be_seen(monkeypatch):
    """The wrong variant: all have ended after their first token."""
    note = FedTokens.note
    padded, _ = rollout("keep")
    wrong = torch.tensor([True, True, False, True])
    monkeypatch.setattr(FedTokens, "note", lambda self, done, tokens: note(self, wrong, tokens))
    wrong, _ = rollout("auto")
    assert not torch.equal(wrong.sequences, padded.sequences)


def test_what_no_expert_saw_is_missing():
    """Its hidden states lack the experts, so that later routers selected something else."""
    padded, _ = rollout("keep")
    compact, _ = rollout("auto")
    missing = (compact.records == 255).all(-1).all(-1)
    for row, (prompt, completion) in enumerate(zip(LENGTHS, lengths_of(padded.sequences), strict=True)):
        assert missing[row].tolist() == [
            not WIDTH - prompt <= place < WIDTH + completion - 1 for place in range(missing.shape[1])
        ]
    assert not (padded.records[:, :-1] == 255).any()


@pytest.mark.parametrize("pad", [0, ENDS[0]], ids=["padding of its own", "padding is an end"])
def test_whoever_cuts_elsewhere_has_every_row(pad):
    """`generation_kwargs={"eos_token_id": ...}` ends sequences with tokens that the trainer takes for no end."""
    cuts = ENDS[:1]
    kwargs = {"pad_token_id": pad, "suppress_tokens": cuts}
    padded, all_rows = rollout("keep", **kwargs)
    compact, rows = rollout("auto", ends=cuts, **kwargs)
    width = padded.sequences.shape[1] - WIDTH
    assert_same_rollout(compact, padded, taken := lengths_of(padded.sequences, cuts))
    sampled = lengths_of(padded.sequences, ENDS)
    assert max(sampled) > 3 and taken == [min(length + 1, width) if pad else width for length in sampled]
    assert sum(all_rows) - sum(rows) > (sum(length < width - 1 for length in taken) if pad else 0)
    too_early, _ = rollout("auto", ends=None, **kwargs)
    with pytest.raises(AssertionError):
        assert_same_rollout(too_early, padded, taken)


class Third(StoppingCriteria):
    """Ends the first sequence after its third token."""

    def __call__(self, input_ids, scores, **kwargs):
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        done[0] = input_ids.shape[1] >= WIDTH + 3
        return done


def test_sequences_that_stop_and_go_on_are_not_ended():
    """Where no token ends a sequence, `generate` feeds what it sampled until all have stopped."""
    kwargs = {"eos_token_id": None, "stopping_criteria": StoppingCriteriaList([Third()])}
    padded, _ = rollout("keep", **kwargs)
    compact, rows = rollout("auto", **kwargs)
    assert_same_rollout(compact, padded, [NEW] * 4)
    assert rows == [sum(LENGTHS), *[4] * (NEW - 1)]


def test_sequences_that_something_else_stops_have_ended():
    kwargs = {"eos_token_id": [127], "stopping_criteria": StoppingCriteriaList([Third()])}
    padded, _ = rollout("keep", **kwargs)
    compact, rows = rollout("auto", **kwargs)
    assert (padded.sequences[0, WIDTH + 3 :] == 0).all()
    lengths = [3, *lengths_of(padded.sequences, [127])[1:]]
    assert_same_rollout(compact, padded, lengths)
    assert rows[3:5] == [sum(length > 3 for length in lengths), sum(length > 4 for length in lengths)]


WAYS = {
    "chunks of the prompt": {"prefill_chunk_size": 3},
    "several sequences of a prompt": {"num_return_sequences": 2},
    "no mask": {"attention_mask": None, "input_ids": IDS[1:2]},
    "scores": {"output_scores": True, "return_dict_in_generate": True},
    "a static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("kwargs", WAYS.values(), ids=WAYS)
def test_ways_of_generating(kwargs):
    padded, all_rows = rollout("keep", **kwargs)
    compact, rows = rollout("auto", **kwargs)
    assert torch.equal(compact.sequences, padded.sequences)
    assert sum(rows) <= sum(all_rows)


def test_whoever_watches_sees_all_rows_computed():
    padded, all_rows = rollout("keep")
    model = tiny_qwen3_moe()
    experts_of(model)[0].register_forward_hook(lambda module, args, output: None)
    watched, rows = rollout("auto", model)
    assert rows == all_rows and torch.equal(watched.sequences, padded.sequences)


def test_a_model_that_keeps_padding_in_its_experts(monkeypatch):
    model = tiny_qwen3_moe()
    with RouterReplay(model, padding="auto") as replay:
        replay.padding.remove()
        rows = rows_of_calls(model)
        torch.manual_seed(0)
        model.generate(IDS, attention_mask=MASK, max_new_tokens=2, do_sample=False)
        with recorded_as_fed(model, replay) as recorded:
            model.generate(IDS, attention_mask=MASK, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert set(rows) == {4 * WIDTH, 4} and recorded.packed.shape[:2] == (4, WIDTH + 1)


def test_what_is_real():
    fed = FedTokens()
    assert torch.equal(fed.real((4, WIDTH), MASK), MASK.bool())
    assert torch.equal(fed.real((4, 3), MASK), MASK[:, 4:].bool())  # the last chunk of a prompt
    for mask in (None, MASK[None], MASK[:2], MASK[:, :5]):
        assert fed.real((4, WIDTH), mask) is None
    assert fed.real((4, 1), MASK) is None  # nobody has ended yet
    fed.note(torch.tensor([False, True, False, False]), torch.tensor([5, 6, 7, 8]))
    fed.note(torch.tensor([False, False, False, True]), torch.tensor([5, 6, 7, 8]))  # once ended, ended
    assert fed.real((4, 1), MASK).tolist() == [[True], [False], [True], [False]]
    assert fed.real((8, 1), None) is None


@pytest.mark.parametrize("ends", [(), [1], [1, 2], [7]])
def test_tokens_up_to_the_first_end_are_drawn(ends):
    completions = torch.tensor([[3, 1, 0, 1], [1, 0, 0, 0], [2, 3, 4, 5], [3, 3, 3, 2]])
    drawn_BC = drawn_tokens(completions, ends)
    for row, drawn in zip(completions.tolist(), drawn_BC.tolist(), strict=True):
        first = next((at for at, token in enumerate(row) if token in ends), len(row))
        assert drawn == [at <= first for at in range(len(row))]
    assert drawn_tokens(completions[:, :0], ends).shape == (4, 0)


@pytest.mark.parametrize("ends", [5, [5, 6], torch.tensor([5, 6]), None])
def test_ends_of_every_form(ends):
    expected = {int: [5], type(None): []}.get(type(ends), [5, 6])
    config = GenerationConfig(eos_token_id=ends)
    assert end_tokens(tiny_qwen3_moe(), {"eos_token_id": ends}) == expected
    assert end_tokens(tiny_qwen3_moe(), {"generation_config": config}) == (expected or [EOS])


@pytest.mark.parametrize("pad", [PAD, EOS], ids=["padding of its own", "padding is an end"])
def test_padding_was_not_drawn(pad):
    """Nothing was kept that it could be of, and no log-probability is that of drawing it."""
    model, prompt = tiny_qwen3_moe(), torch.arange(70, 82).view(4, 3)
    kwargs = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": True, "top_k": 9}
    kwargs |= {"eos_token_id": [EOS, *ENDS], "pad_token_id": pad, "suppress_tokens": [PAD, EOS]}
    torch.manual_seed(0)
    generated = generate_with_routes(model, None, model.generate, (prompt,), kwargs, temperature=1.0, keeps=True)
    completions = generated.sequences[:, 3:].tolist()
    turn = generated.turn(prompt.tolist(), completions)
    lengths = [next((at + 1 for at, token in enumerate(row) if token in ENDS), len(row)) for row in completions]
    assert min(lengths) < max(lengths)
    for row, length, mask, logprobs in zip(completions, lengths, turn.masks, turn.logprobs, strict=True):
        mask.check(row, 0)
        assert [len(kept) for kept in kept_rows(mask)] == [9] * length + [0] * (len(row) - length)
        assert logprobs.isnan().tolist() == [False] * length + [True] * (len(row) - length)


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_a_trainer_that_knows_fewer_ends(tmp_path, pad):
    """Masks of a rollout that `generation_kwargs` ends where TRL reads on."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = pad
    trainer = make_trainer(
        tmp_path,
        conversations(["t70 t71 t72", "t73", "t74 t75 t76", "t90 t91"]),
        processing_class=tokenizer,
        use_sampling_mask_replay=True,
        top_k=20,
        generation_kwargs={"eos_token_id": [EOS, *ENDS], "suppress_tokens": [PAD, EOS]},
        max_steps=1,
    )
    trainer.train()
    tokens = [token for turn in trainer.turns for ids in turn.completion_ids for token in ids]
    assert set(tokens) & set(ENDS) and tokenizer.pad_token_id in tokens
    assert trainer.state.log_history[0]["sampling/k3_kl"] < 1e-8
