"""Sampling masks of vLLM, from completions as far as they are read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from oracles import kept_rows, some_kept

from trl_r3.engines.vllm_colocate import recorded_llm
from trl_r3.engines.vllm_masks import decode_vllm_mask


def vllm_completion(tokens, rows):
    """A `CompletionOutput` of vLLM 0.30, as far as it is read."""
    mask = None if rows is None else SimpleNamespace(token_ids=rows)
    return SimpleNamespace(token_ids=tokens, sampling_mask=mask)


def test_vllm_masks_are_decoded():
    """Three completions by TRL's order of prompts; `token_ids` is one list a token, of plain integers."""
    tokens = [[8, 9, 1], [3], [4, 4]]
    outputs = [SimpleNamespace(outputs=[vllm_completion(each, some_kept(each))]) for each in tokens]
    engine = SimpleNamespace(generate=lambda *args, **kwargs: outputs)
    generation = SimpleNamespace(llm=engine, tensor_parallel_size=1)
    with recorded_llm(SimpleNamespace(vllm_generation=generation), None, True, None) as make_turn:
        generation.llm.generate([], None)
    turn = make_turn([[2], [2, 2], [5]], tokens)
    assert [kept_rows(mask) for mask in turn.masks] == [some_kept(each) for each in tokens]
    assert turn.logprobs is None  # vLLM's own are over what it kept


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "`sampling_mask` of the completion is None"),
        ([[8]], "returned 1 lists of kept ids for 2 sampled tokens"),
        ([[8], []], "the first empty one at position 1"),
    ],
)
def test_vllm_masks_that_are_none(rows, message):
    with pytest.raises(ValueError, match=f"sample 4: .*{message}"):
        decode_vllm_mask(rows, 2, 4)
