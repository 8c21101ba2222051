"""What each engine's sampler kept, against an oracle that sees the scores another way.

Legend: B sequences, C new tokens, V vocabulary.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from engines.test_rollout_tools import scripted
from engines.tiny_chat import conversations, make_trainer
from model_zoo import build_tiny
from oracles import kept_rows

from trl_r3 import RouterReplay, SamplingMask, Turn, stitch
from trl_r3.engines.generate import generate_with_routes
from trl_r3.engines.vllm_colocate import recorded_llm
from trl_r3.engines.vllm_masks import decode_vllm_mask
from trl_r3.engines.vllm_versions import check_vllm_masks

TEMPERATURE, NEW = 0.7, 12


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_tiny("qwen3_moe").eval()


CUTS = {
    "top_p": {"top_p": 0.8},
    "top_k": {"top_k": 7},
    "min_p": {"min_p": 0.5},
    "typical": {"typical_p": 0.6},
    "bad words": {"bad_words_ids": [[5], [9, 4]]},
    "repetition": {"top_p": 0.8, "repetition_penalty": 1.3},
    "no end before": {"top_k": 9, "min_new_tokens": 4},
    "greedy": {"do_sample": False},
    "nothing": {},
}


@pytest.mark.parametrize("cut", CUTS)
def test_generate(model, cut):
    """`output_scores` returns what a step draws from, `output_logits` what the model computed."""
    torch.manual_seed(1)
    prompt = torch.randint(2, model.config.vocab_size, (3, 4))
    kwargs = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "max_new_tokens": NEW, "eos_token_id": None}
    kwargs |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "pad_token_id": 0}
    if cut == "no end before":
        kwargs["eos_token_id"] = 1
    kwargs |= {"attention_mask": torch.ones_like(prompt), **CUTS[cut]}
    generated = generate_with_routes(
        model, None, model.generate, (prompt,), kwargs, temperature=TEMPERATURE, keeps=True
    )
    output, completions = generated.output, generated.sequences[:, 4:].tolist()
    turn = generated.turn(prompt.tolist(), completions)
    cut_rows = 0
    for i, completion in enumerate(completions):
        for c, row in enumerate(kept_rows(turn.masks[i])):
            finite = output.scores[c][i].isfinite()
            expected = [] if bool(finite.all()) else finite.nonzero()[:, 0].tolist()
            assert row == expected
            p = (output.logits[c][i].double() / TEMPERATURE)[expected or slice(None)].log_softmax(0)
            value = p[(expected or list(range(len(finite)))).index(completion[c])]
            assert float(turn.logprobs[i][c]) == pytest.approx(float(value), abs=1e-5)
            cut_rows += bool(expected)
        turn.masks[i].check(completion, i)
    assert (cut_rows == 0) == (cut in ("greedy", "nothing"))
    assert not {"generate", "_get_logits_processor"} & set(vars(model))
    assert not model._forward_hooks


def test_masks_change_no_token_and_no_route(model):
    """The recorder draws no random number, and routes are recorded beside it."""
    prompt = torch.randint(2, model.config.vocab_size, (2, 5), generator=torch.Generator().manual_seed(0))
    kwargs = {"do_sample": True, "top_p": 0.8, "top_k": 0, "max_new_tokens": NEW, "pad_token_id": 0}
    found = []
    for masks in (False, True):
        torch.manual_seed(3)
        with RouterReplay(model) as replay:
            found.append(
                generate_with_routes(model, replay, model.generate, (prompt,), kwargs, temperature=1.0, keeps=masks)
            )
    plain, kept = found
    turn = kept.turn(prompt.tolist(), kept.sequences[:, 5:].tolist())
    assert all(0 < len(row) < model.config.vocab_size for mask in turn.masks for row in kept_rows(mask))
    torch.manual_seed(3)
    assert torch.equal(model.generate(prompt, **kwargs), plain.sequences)
    assert torch.equal(plain.sequences, kept.sequences) and torch.equal(plain.records, kept.records)


def test_ways_of_decoding_that_draw_elsewhere_are_refused(model):
    prompt = torch.full((1, 3), 5)
    refused = pytest.raises(ValueError, match="a rollout cannot be recorded with `num_beams=2`")
    kwargs = {"num_beams": 2, "max_new_tokens": 2}
    with refused:
        generate_with_routes(model, None, model.generate, (prompt,), kwargs, temperature=1.0, keeps=True)


@pytest.mark.parametrize("routes", [False, True])
def test_tool_loop(tmp_path, routes):
    """Every sampled token has its row, from the turn that sampled it, and what tools said has none."""
    seen = []

    trainer = make_trainer(
        tmp_path,
        conversations(["stop", "once", "twice", "full"]),
        tools=[look, again, deep],
        max_completion_length=16,
        top_p=0.9,
        generation_kwargs=scripted(),
        use_routing_replay=routes,
        use_sampling_mask_replay=True,
    )
    own = trainer._generate_and_score_completions

    def note(inputs):
        output = own(inputs)
        seen.append((output, trainer.rollout_samples))
        return output

    trainer._generate_and_score_completions = note
    trainer.train()
    output, samples = seen[0]
    sampled = said = 0
    for i, sample in enumerate(samples):
        completion = sample.tokens[sample.prompt_length :].tolist()
        assert len(sample.mask) == len(completion)
        tool_mask = output["tool_mask"][i][: len(completion)].tolist()
        for token, row, drawn in zip(completion, kept_rows(sample.mask), tool_mask, strict=True):
            assert (token in row) == bool(drawn)
            sampled, said = sampled + drawn, said + (not drawn)
            assert row or not drawn
    assert sampled
    assert said


def look() -> str:
    """Look up."""
    return "sun moon"


def again() -> str:
    """Look again."""
    return "wait"


def deep() -> str:
    """Look down."""
    return "down"


def some_rows(tokens):
    return [sorted({token, token + 1 + i, token + 7}) for i, token in enumerate(tokens)]


def test_turns_are_joined_by_tokens():
    """Two samples with a tool between their turns, in another order; the last turn is cut."""
    one = Turn([[5, 6], [5, 7]], [[8, 9], [8, 1]], [], masks=[SamplingMask.of(some_rows(c)) for c in ([8, 9], [8, 1])])
    later = [12, 13, 14]
    two = Turn([[5, 6, 8, 9, 40, 41]], [later], [], masks=[SamplingMask.of(some_rows(later))])
    for turns in ([one, two], [two, one]):
        record = stitch(turns, [[5, 6], [5, 7]], [[8, 9, 40, 41, 12, 13], [8, 1]], None)
        first, second = (kept_rows(mask) for mask in record.masks)
        assert first == [*some_rows([8, 9]), [], [], *some_rows(later)[:2]]
        assert second == some_rows([8, 1])
        assert [len(each) for each in record.records] == [0, 0]
    one.masks = None
    assert stitch([one, two], [[5, 6], [5, 7]], [[8, 9, 40, 41, 12, 13], [8, 1]], None).masks is None


def test_a_row_without_its_token_is_an_error():
    turn = Turn([[5]], [[8, 9]], [], masks=[SamplingMask.of([[8], [3, 4]])])
    with pytest.raises(ValueError, match=r"sample 0: token 9 was sampled at position 1 of the completion"):
        stitch([turn], [[5]], [[8, 9]], None)


def vllm_completion(tokens, rows):
    """A `CompletionOutput` of vLLM 0.30, as far as it is read."""
    mask = None if rows is None else SimpleNamespace(token_ids=rows)
    return SimpleNamespace(token_ids=tokens, sampling_mask=mask)


def test_vllm_masks_are_decoded():
    """Three completions by TRL's order of prompts; `token_ids` is one list a token, of plain integers."""
    tokens = [[8, 9, 1], [3], [4, 4]]
    outputs = [SimpleNamespace(outputs=[vllm_completion(each, some_rows(each))]) for each in tokens]
    engine = SimpleNamespace(generate=lambda *args, **kwargs: outputs)
    generation = SimpleNamespace(llm=engine, tensor_parallel_size=1)
    with recorded_llm(SimpleNamespace(vllm_generation=generation), None, True, None) as make_turn:
        generation.llm.generate([], None)
    turn = make_turn([[2], [2, 2], [5]], tokens)
    assert [kept_rows(mask) for mask in turn.masks] == [some_rows(each) for each in tokens]
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


@pytest.mark.parametrize("version", ["0.28.0", "0.30.0+cpu", "0.33.1"])
def test_vllm_versions_with_masks(version):
    check_vllm_masks(version)


@pytest.mark.parametrize("version", ["0.22.0", "0.27.3", "0.34.0"])
def test_vllm_versions_without(version):
    with pytest.raises(ValueError, match="sampling masks are known from 0.28 to 0.33"):
        check_vllm_masks(version)
