"""Masks that a rollout function brings, and masks that would meet other tokens than theirs."""

import pytest
import torch
from trainers.masking import TOP_P, VOCAB, kept_by, logits_of

from trl_r3 import SamplingMask, stitch


@pytest.fixture
def rollout_func():
    """A rollout of two turns, between which a tool says one token; `change` edits what it returns."""

    def make(change=lambda result: result):
        def rollout(prompts, trainer):
            prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
            first, one = trainer.rollout_turn(prompt_ids)
            heard = [[*p, *c, 7] for p, c in zip(prompt_ids, first.completion_ids, strict=True)]
            second, two = trainer.rollout_turn(heard)
            completions = [[*a, 7, *b] for a, b in zip(first.completion_ids, second.completion_ids, strict=True)]
            record = stitch([first, second], prompt_ids, completions, None)
            return change(
                {
                    "prompt_ids": prompt_ids,
                    "completion_ids": completions,
                    "logprobs": [[*a, 0.0, *b] for a, b in zip(one, two, strict=True)],
                    "env_mask": [
                        [1] * len(a) + [0] + [1] * len(b)
                        for a, b in zip(first.completion_ids, second.completion_ids, strict=True)
                    ],
                    "sampling_masks": record.masks,
                }
            )

        return rollout

    return make


def test_turns_of_a_rollout_func(make_masked, rollout_func):
    """Sampled tokens are over what was kept, and what the tool said over the whole vocabulary."""
    trainer = make_masked(rollout_func=rollout_func(), max_completion_length=4)
    trainer.train()
    by_tokens = {(*p, *c): then for then, ps, cs in trainer.rollouts for p, c in zip(ps, cs, strict=True)}
    heard = 0
    for _, weights, input_ids, attention_mask, width, logps, _ in trainer.passes:
        for row in range(len(input_ids)):
            tokens = input_ids[row][attention_mask[row].bool()].tolist()
            count = int(attention_mask[row, -width:].sum())
            logits = logits_of(trainer, weights, tokens)
            at_rollout = logits_of(trainer, by_tokens[tuple(tokens)], tokens)
            ends = {len(key) for key in by_tokens if list(key) == tokens[: len(key)]}
            for c in range(count):
                position = len(tokens) - count + c - 1
                said = position + 1 in ends  # the token after a turn
                kept = torch.arange(VOCAB) if said else kept_by(at_rollout[position], top_p=TOP_P)
                p = logits[position][kept].log_softmax(0)[(kept == tokens[position + 1]).nonzero()[0, 0]]
                assert float(logps[row, c]) == pytest.approx(float(p), abs=2e-5)
                heard += said
    assert heard


def wrong_token(result):
    mask = result["sampling_masks"][1]
    token = result["completion_ids"][1][2]
    rows = [mask.ids[a:b] for a, b in zip(mask.offsets[:-1], mask.offsets[1:], strict=True)]
    rows[2] = [v for v in range(VOCAB) if v != token][:9]
    result["sampling_masks"][1] = SamplingMask.of(rows)
    return result


WRONG = {
    "returned no `sampling_masks`": lambda result: {k: v for k, v in result.items() if k != "sampling_masks"},
    "`sampling_masks` of 3 samples for 4 prompts": lambda r: {**r, "sampling_masks": r["sampling_masks"][1:]},
    "sample 0: its entry of `sampling_masks` is a list": lambda r: {**r, "sampling_masks": [[]] * 4},
    r"sample 0: its sampling mask has \d+ rows, but": lambda r: {
        **r,
        "sampling_masks": [SamplingMask.unrestricted(99)] * 4,
    },
    r"sample 1: token \d+ was sampled at position 2 of the completion, but is not among the 9 ids": wrong_token,
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_masks_of_a_rollout_func(make_masked, rollout_func, message):
    trainer = make_masked(rollout_func=rollout_func(WRONG[message]), max_completion_length=4)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_batch_that_lost_its_identities(make_masked):
    trainer = make_masked()
    own = trainer._generate_and_score_completions

    def lose(inputs):
        output = own(inputs)
        del output["rollout_samples"]
        return output

    trainer._generate_and_score_completions = lose
    with pytest.raises(RuntimeError, match="no `rollout_samples` among"):
        trainer.train()


def test_a_batch_that_was_shuffled_without_its_identities(make_masked):
    """The wrong mask of another sample is no number: the tokens tell."""
    trainer = make_masked()
    own = trainer._generate_and_score_completions

    def swap(inputs):
        output = own(inputs)
        output["rollout_samples"] = output["rollout_samples"].flip(0)
        return output

    trainer._generate_and_score_completions = swap
    with pytest.raises(RuntimeError, match="tokens of the batch differ from those that its record was made for"):
        trainer.train()
