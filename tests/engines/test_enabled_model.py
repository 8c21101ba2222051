"""`generate()` returns the routes of its rollout, and is otherwise the one of Transformers."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from engines.generating import WITH_ROUTES, check_routes, generate, mask_of
from hypothesis import given
from hypothesis import strategies as st
from oracles import CHECKPOINTING, as_sets, differing, foreign_record, gradients, stacked, use_checkpointing
from routers.left_behind import same_traces, traces
from token_oracle import OF_ROLLOUT, oracle, pad, samples, with_models
from transformers import (
    GenerationConfig,
    Qwen3MoeForSequenceClassification,
    StoppingCriteria,
    StoppingCriteriaList,
)

from trl_r3 import disable_routing_replay, enable_routing_replay
from trl_r3.cli.experts import executed_ids
from trl_r3.routers.patches import Patch

WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 3},
    "chunked prefill into a static cache": {"prefill_chunk_size": 5, "cache_implementation": "static"},
    "chunk as long as the prompt": {"prefill_chunk_size": 14},
    "one token": {"max_new_tokens": 1},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", ["left", "none"])
def test_routes_are_those_of_a_full_forward(model, padded, way, padding):
    ids, mask = padded
    if padding == "none":
        ids, mask = ids[:1], mask[:1]
    untouched = copy.deepcopy(model)
    enable_routing_replay(model)
    out = generate(model, ids, mask, **WAYS[way], **WITH_ROUTES)
    assert out.sequences.shape[1] == 14 + WAYS[way].get("max_new_tokens", 8)
    check_routes(out, mask_of(out, mask), untouched)
    expected = generate(untouched, ids, mask, **WAYS[way])
    assert torch.equal(out.sequences, expected), "recording changes no token"


@pytest.mark.parametrize("ends", [[5], [5, 6, 7, 8, 9, 10, 11, 12]])
@pytest.mark.parametrize("pad", [0, 5])
@pytest.mark.parametrize("seed", range(3))
def test_early_ends(qwen, padded, ends, pad, seed):
    """Sequences end at different steps; the padding token may be one of the end tokens."""
    ids, mask = padded
    untouched = copy.deepcopy(qwen)
    enable_routing_replay(qwen)
    with torch.no_grad():
        qwen.lm_head.weight[ends] *= 3  # so that they are sampled
    torch.manual_seed(seed)
    out = qwen.generate(
        ids, attention_mask=mask, do_sample=True, max_new_tokens=24, eos_token_id=ends, pad_token_id=pad, **WITH_ROUTES
    )
    real = mask_of(out, mask, ends)
    check_routes(out, real, untouched)


def test_some_end_early_and_some_do_not(qwen, padded):
    """The settings above do produce what they are for."""
    ids, mask = padded
    enable_routing_replay(qwen)
    with torch.no_grad():
        qwen.lm_head.weight[5:13] *= 3
    torch.manual_seed(0)
    out = qwen.generate(
        ids, attention_mask=mask, do_sample=True, max_new_tokens=24, eos_token_id=list(range(5, 13)), **WITH_ROUTES
    )
    lengths = mask_of(out, mask, range(5, 13))[:, 14:].sum(1).tolist()
    assert len(set(lengths)) > 1, lengths


def test_sampled_padding_token_keeps_its_row(qwen, padded):
    """Without a stopping criterion, a padding token in a completion was sampled and fed."""
    ids, mask = padded
    untouched = copy.deepcopy(qwen)
    enable_routing_replay(qwen)
    allowed = {"prefix_allowed_tokens_fn": lambda batch, sent: [0] if len(sent) > 16 else [17]}
    out = generate(qwen, ids, mask, pad_token_id=0, eos_token_id=3, **allowed, **WITH_ROUTES)
    assert (out.sequences[:, 17:] == 0).all()
    check_routes(out, mask_of(out, mask, [3]), untouched)


class AfterThree(StoppingCriteria):
    """Ends sample 0 after three new tokens."""

    def __call__(self, ids, scores, **kwargs):
        done = torch.zeros(ids.shape[0], dtype=torch.bool)
        done[0] = ids.shape[1] >= 14 + 3
        return done


@pytest.mark.parametrize("pad", [0, 127], ids=["padding of its own", "padding is the end"])
@pytest.mark.parametrize("padding", ["keep", "auto"])
def test_stopping_criterion(mixtral, padded, pad, padding):
    ids, mask = padded
    untouched = copy.deepcopy(mixtral)
    enable_routing_replay(mixtral, padding=padding)
    settings = {"stopping_criteria": StoppingCriteriaList([AfterThree()]), "eos_token_id": 127, "pad_token_id": pad}
    out = generate(mixtral, ids, mask, do_sample=True, **settings, **WITH_ROUTES)
    disable_routing_replay(mixtral)  # it packs attention, which all models share
    real = mask_of(out, mask, [127])
    assert (out.sequences[0, 17:] == pad).all() and (out.sequences[0, 14:17] != pad).all()
    real[0, 17 + (pad == 127) :] = 0  # the first one passes for an end
    check_routes(out, real, untouched)


@pytest.mark.parametrize("given", ["argument", "argument beside a config", "config", "model"])
def test_whose_ends_count(qwen, padded, given):
    """`None` as an argument switches the ends of the model off; in a config it leaves them."""
    ids, mask = padded
    untouched, ends = copy.deepcopy(qwen), list(range(3, 60))
    enable_routing_replay(qwen)
    qwen.generation_config.eos_token_id = [127] if given == "config" else ends
    config = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    kwargs = config if given in ("argument", "model") else {"generation_config": GenerationConfig(**config)}
    if given == "config":
        kwargs["generation_config"].eos_token_id = ends
    elif given != "model":
        kwargs["eos_token_id"] = None
        ends = []
    out = qwen.generate(ids, attention_mask=mask, output_routed_experts=True, **kwargs)
    real = mask_of(out, mask, ends)
    assert torch.isin(out.sequences[:, 14:21], torch.arange(3, 60)).any(), "an end was sampled"
    assert bool((real[:, 14:] == 0).any()) == bool(ends)
    check_routes(out, real, untouched)


@pytest.mark.parametrize("given", ["positional", "inputs", "input_ids"])
def test_ways_to_pass_the_prompt(qwen, padded, given):
    ids, mask = padded
    enable_routing_replay(qwen)
    expected = generate(qwen, ids, mask, **WITH_ROUTES)
    args, kwargs = ((ids,), {}) if given == "positional" else ((), {given: ids})
    out = qwen.generate(*args, **kwargs, attention_mask=mask, max_new_tokens=8, do_sample=False, **WITH_ROUTES)
    assert torch.equal(out.routed_experts, expected.routed_experts)
    inferred = qwen.generate(*args, **kwargs, pad_token_id=0, max_new_tokens=8, do_sample=False, **WITH_ROUTES)
    assert torch.equal(inferred.routed_experts, expected.routed_experts), "the mask follows from the padding"


def test_generation_config_is_left_as_it_was(qwen, ids):
    enable_routing_replay(qwen)
    config = GenerationConfig(max_new_tokens=4, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    before, own = config.to_dict(), qwen.generation_config.to_dict()
    out = qwen.generate(ids, generation_config=config, output_routed_experts=True)
    assert out.routed_experts.shape == (2, 16, 2, 2)
    assert config.to_dict() == before and qwen.generation_config.to_dict() == own


@pytest.mark.parametrize("whose", ["given", "model's"])
def test_generation_config_may_ask_for_routes(qwen, ids, whose):
    enable_routing_replay(qwen)
    config = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0, **WITH_ROUTES)
    if whose == "given":
        out = qwen.generate(ids, generation_config=config)
    else:
        qwen.generation_config = config
        out = qwen.generate(ids)
        assert not hasattr(qwen.generate(ids, output_routed_experts=False), "routed_experts")
    assert out.routed_experts.shape == (2, 16, 2, 2)


# generate() without routes


@pytest.mark.parametrize("way", ["greedy", "sampling", "beams", "no cache", "dictionary"])
def test_without_routes_generate_is_that_of_the_model(qwen, padded, way):
    ids, mask = padded
    settings = {
        "greedy": {},
        "sampling": {"do_sample": True},
        "beams": {"num_beams": 3},
        "no cache": {"use_cache": False},
        "dictionary": {"return_dict_in_generate": True, "output_logits": True},
    }[way]
    expected = generate(qwen, ids, mask, **settings)
    own = vars(qwen).get("generate")
    enable_routing_replay(qwen)
    out = generate(qwen, ids, mask, **settings)
    assert type(out) is type(expected)
    if way == "dictionary":
        assert list(out) == list(expected) and "routed_experts" not in out
        assert all(torch.equal(*pair) for pair in zip(out.logits, expected.logits, strict=True))
        out, expected = out.sequences, expected.sequences
    assert torch.equal(out, expected)
    disable_routing_replay(qwen)
    assert vars(qwen).get("generate") is own
    assert torch.equal(generate(qwen, ids, mask), generate(copy.deepcopy(qwen), ids, mask))


def test_a_generate_that_was_wrapped_afterwards(qwen, ids):
    """As FSDP2's `register_fsdp_forward_method` does, by which Trainer lets `generate` gather the weights."""
    enable_routing_replay(qwen)
    own = qwen.generate

    @functools.wraps(own)
    def gathered(model, *args, **kwargs):
        return own(*args, **kwargs)

    qwen.generate = gathered.__get__(qwen)
    assert "routed_experts" in generate(qwen, ids, **WITH_ROUTES)
    disable_routing_replay(qwen)
    assert not any(isinstance(module.__dict__.get("forward"), Patch) for module in qwen.modules())
    with pytest.raises(ValueError, match="output_routed_experts"):
        generate(qwen, ids, **WITH_ROUTES)
    with pytest.raises(ValueError, match="no routing replay to disable"):
        disable_routing_replay(qwen)


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


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_a_reward_model(qwen, ids, kind):
    """It has no `generate`: its recomputes are steadied, and it takes a record."""
    qwen.config.num_labels, qwen.config.pad_token_id = 1, 0
    model = Qwen3MoeForSequenceClassification(qwen.config).train()
    use_checkpointing(model, kind)
    before = traces(model)
    labels = torch.tensor([[1.0], [0.0]])
    model(ids, labels=labels).loss.backward()
    plain = gradients(model)
    replay = enable_routing_replay(model, steady_recompute=True)
    model(ids, labels=labels).loss.backward()
    assert differing(gradients(model), plain) == []
    record = foreign_record(replay, *ids.shape)
    with executed_ids(model) as seen:
        model(ids, labels=labels, routed_experts=record).loss.backward()
    assert torch.equal(stacked(seen, len(ids)), record) and differing(gradients(model), plain) != []
    disable_routing_replay(model)
    assert same_traces(traces(model), before)
    with pytest.raises(ValueError, match="no routing replay to disable"):
        disable_routing_replay(model)
