"""What is recorded of a call of `generate()`, and the ways of decoding that cannot be recorded.

What the sampler kept is held against an oracle that sees the scores another way.

Legend: B sequences, C new tokens, V vocabulary.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from engines.generating import WITH_ROUTES, generate
from model_zoo import build_tiny
from oracles import as_sets, foreign_record, kept_rows, stacked
from transformers import DynamicCache, GenerationConfig

from trl_r3 import RouterReplay, enable_routing_replay
from trl_r3.cli.experts import executed_ids
from trl_r3.engines.generate import generate_with_routes

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


# What is refused, with the reason and what to set instead


@pytest.mark.parametrize("where", ["argument", "config of the call", "config of the model"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_beams": 2}, "`num_beams=2`.* Set `num_beams=1`"),
        ({"prompt_lookup_num_tokens": 3}, "assisted decoding.* Set"),
        ({"assistant_early_exit": 1}, "assisted decoding.* Set"),
        ({"use_mtp": True}, "assisted decoding.* Set"),
        ({"guidance_scale": 2.0}, "`guidance_scale=2.0`.* Set"),
    ],
)
def test_ways_of_decoding_that_are_refused(qwen, ids, setting, message, where):
    enable_routing_replay(qwen)
    kwargs = dict(setting)
    if where == "config of the call":
        kwargs = {"generation_config": GenerationConfig(return_dict_in_generate=True, pad_token_id=0, **setting)}
    elif where == "config of the model":
        qwen.generation_config.update(**setting)
        kwargs = {}
    with executed_ids(qwen) as seen, pytest.raises(ValueError, match=message):
        qwen.generate(ids, max_new_tokens=3, **kwargs, **WITH_ROUTES)
    assert not seen, "nothing was generated"


@pytest.mark.parametrize("given", [{"use_cache": False}, {"generation_config": {"use_cache": False}}])
def test_no_cache_is_refused_where_it_is_asked_for(qwen, ids, given):
    enable_routing_replay(qwen)
    if "generation_config" in given:
        config = {"return_dict_in_generate": True, "pad_token_id": 0, **given["generation_config"]}
        given = {"generation_config": GenerationConfig(**config)}
    with pytest.raises(ValueError, match="`use_cache=False`.* Set `use_cache=True`"):
        qwen.generate(ids, max_new_tokens=3, **given, **WITH_ROUTES)


@pytest.mark.parametrize("where", ["config", "generation_config"])
def test_cache_that_a_trainer_switched_off_is_switched_on(qwen, ids, where):
    """Gradient checkpointing lets a `Trainer` write `use_cache=False` into a model's config."""
    enable_routing_replay(qwen)
    expected = generate(qwen, ids, **WITH_ROUTES)
    getattr(qwen, where).use_cache = False
    out = generate(qwen, ids, **WITH_ROUTES)
    assert torch.equal(out.routed_experts, expected.routed_experts)
    assert getattr(qwen, where).use_cache is False


def test_generate_without_a_forward_is_an_error(qwen, ids):
    """Something took the place of `generate` and made the sequences elsewhere."""
    qwen.generate = lambda *args, **kwargs: ids
    enable_routing_replay(qwen)
    with pytest.raises(RuntimeError, match="returned without a forward of the model"):
        qwen.generate(ids, **WITH_ROUTES)


def test_other_ways_that_are_refused(qwen, ids):
    enable_routing_replay(qwen)
    with pytest.raises(ValueError, match="return_dict_in_generate=True"):
        qwen.generate(ids, max_new_tokens=3, output_routed_experts=True)
    for kwargs, word in (
        ({"assistant_model": build_tiny("qwen3_moe")}, "assisted decoding"),
        ({"custom_generate": lambda *args, **kwargs: ids}, "custom_generate"),
        ({"inputs_embeds": qwen.get_input_embeddings()(ids)}, "inputs_embeds"),
    ):
        with pytest.raises(ValueError, match=word):
            qwen.generate(None if "inputs_embeds" in kwargs else ids, max_new_tokens=3, **kwargs, **WITH_ROUTES)
    qwen.compile()
    with pytest.raises(ValueError, match="compiled"):
        qwen.generate(ids, max_new_tokens=3, **WITH_ROUTES)


def test_cache_that_holds_the_prompt_is_refused(qwen, ids):
    """Its tokens were fed before anyone recorded."""
    enable_routing_replay(qwen)
    name = "cache" if "cache" in inspect.signature(qwen.forward).parameters else "past_key_values"
    cache = DynamicCache(config=qwen.config)
    with torch.no_grad():
        qwen(ids[:, :5], **{name: cache})
    with pytest.raises(RuntimeError, match=f"fed .* tokens in .* forwards, .* pass no .*`{name}`"):
        generate(qwen, ids, **{name: cache}, **WITH_ROUTES)


def test_model_called_by_somebody_else_is_an_error(qwen, ids):
    """A logits processor that calls the model feeds tokens which are none of the sequence."""
    enable_routing_replay(qwen)

    def nosy(sent, scores):
        with torch.no_grad():
            qwen(sent[:, -1:])
        return scores

    with pytest.raises(RuntimeError, match="fed"):
        generate(qwen, ids, logits_processor=[nosy], **WITH_ROUTES)


def test_a_failed_generate_leaves_no_state(qwen, ids):
    live = qwen(ids).logits
    replay = enable_routing_replay(qwen)
    expected = generate(qwen, ids, **WITH_ROUTES).routed_experts

    def stop(sent, scores):
        if sent.shape[1] > 14:
            raise KeyError("stop")
        return scores

    with pytest.raises(KeyError):
        generate(qwen, ids, logits_processor=[stop], **WITH_ROUTES)
    assert torch.equal(qwen(ids).logits, live)
    assert torch.equal(generate(qwen, ids, **WITH_ROUTES).routed_experts, expected)
    with replay.replay(record := foreign_record(replay, *ids.shape)), executed_ids(qwen) as seen:
        qwen(ids)
    assert torch.equal(as_sets(stacked(seen, 2)), as_sets(record))
