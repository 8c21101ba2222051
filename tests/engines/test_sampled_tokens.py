"""What `generate()` has drawn, and what it has only filled up.

Legend: B sequences, C tokens of their completions.
"""

from __future__ import annotations

import pytest
import torch
from engines.tiny_chat import EOS, PAD, conversations, make_tokenizer, make_trainer, tiny_qwen3_moe
from oracles import kept_rows
from transformers import GenerationConfig

from trl_r3.engines.generate import end_tokens, generate_with_routes
from trl_r3.engines.sampled_tokens import drawn_tokens

MORE_ENDS = list(range(30, 60))  # half of what is drawn


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
    kwargs |= {"eos_token_id": [EOS, *MORE_ENDS], "pad_token_id": pad, "suppress_tokens": [PAD, EOS]}
    torch.manual_seed(0)
    generated = generate_with_routes(model, None, model.generate, (prompt,), kwargs, temperature=1.0, keeps=True)
    completions = generated.sequences[:, 3:].tolist()
    turn = generated.turn(prompt.tolist(), completions)
    lengths = [next((at + 1 for at, token in enumerate(row) if token in MORE_ENDS), len(row)) for row in completions]
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
        generation_kwargs={"eos_token_id": [EOS, *MORE_ENDS], "suppress_tokens": [PAD, EOS]},
        max_steps=1,
    )
    trainer.train()
    tokens = [token for turn in trainer.turns for ids in turn.completion_ids for token in ids]
    assert set(tokens) & set(MORE_ENDS) and tokenizer.pad_token_id in tokens
    assert trainer.state.log_history[0]["sampling/k3_kl"] < 1e-8
