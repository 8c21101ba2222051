"""`generate()` returns the routes of its rollout, and is otherwise the one of Transformers."""

from __future__ import annotations

import copy
import functools
import inspect

import pytest
import torch
from model_zoo import build_tiny
from oracles import as_sets, changed_rows, foreign_record, stacked
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from trl_r3 import disable_routing_replay, enable_routing_replay
from trl_r3.cli.experts import executed_ids
from trl_r3.routers.patches import Patch

WITH_ROUTES = {"return_dict_in_generate": True, "output_routed_experts": True}


def generate(model, ids, mask=None, **kwargs):
    torch.manual_seed(0)
    kwargs = {"max_new_tokens": 8, "do_sample": False, **kwargs}
    return model.generate(ids, attention_mask=mask, **kwargs)


def mask_of(out, mask, ends=()):
    """Which tokens of the returned sequences are real: written here as a loop over each."""
    width = mask.shape[1]
    repeats = out.sequences.shape[0] // mask.shape[0]
    real = torch.ones_like(out.sequences)
    real[:, :width] = mask.repeat_interleave(repeats, 0)
    for i, sequence in enumerate(out.sequences.tolist()):
        end = next((p for p in range(width, len(sequence)) if sequence[p] in ends), len(sequence))
        real[i, end + 1 :] = 0
    return real


@torch.no_grad()
def full_forward(model, sequences, mask):
    """What an untouched copy executes when it is fed the whole sequences."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with executed_ids(model) as seen:
        model(sequences, attention_mask=mask, position_ids=positions)
    return stacked(seen, sequences.shape[0])


def check_routes(out, real, untouched):
    """Routes are those of a full forward; -1 exactly where nothing was routed: padding, after the end, the last."""
    fed = real.bool()
    for i, row in enumerate(real):
        fed[i, int(row.nonzero().max())] = False
    routes = out.routed_experts
    assert routes.dtype == torch.int16 and routes.shape[:2] == out.sequences.shape
    assert torch.equal((routes == -1).all(-1).all(-1), ~fed)
    assert torch.equal((routes == -1).any(-1).any(-1), ~fed)
    expected = full_forward(untouched, out.sequences, real)
    assert not changed_rows(routes, expected)[fed].any()
    assert changed_rows(routes, expected.roll(1, 1))[fed].any(), "a shift by one would be seen"
    assert fed.any()


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


def test_stopping_criterion(qwen, padded):
    ids, mask = padded
    untouched = copy.deepcopy(qwen)
    enable_routing_replay(qwen)
    settings = {"stopping_criteria": StoppingCriteriaList([AfterThree()]), "eos_token_id": 127, "pad_token_id": 0}
    out = generate(qwen, ids, mask, do_sample=True, **settings, **WITH_ROUTES)
    real = mask_of(out, mask, [127])
    assert (out.sequences[0, 17:] == 0).all() and (out.sequences[0, 14:17] != 0).all()
    real[0, 17:] = 0
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


def test_replaying_a_rollout(model, padded):
    """Own rollout, scored by weights that have moved: live routes differ, replayed ones do not."""
    ids, mask = padded
    enable_routing_replay(model)
    out = generate(model, ids, mask, **WITH_ROUTES)
    real = mask_of(out, mask)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    fed = (out.routed_experts != -1).all(-1).all(-1)
    live = full_forward(model, out.sequences, real)
    assert changed_rows(live, out.routed_experts)[fed].any()
    with executed_ids(model) as seen, torch.no_grad():
        model(out.sequences, attention_mask=real, routed_experts=out.routed_experts)
    assert not changed_rows(stacked(seen, 3), out.routed_experts)[fed].any()


def test_labels_may_only_count_recorded_rows(qwen, padded):
    """A missing row that the loss needs is an error; padding and the last token need none."""
    ids, mask = padded
    enable_routing_replay(qwen)
    out = generate(qwen, ids, mask, **WITH_ROUTES)
    real = mask_of(out, mask)
    labels = out.sequences.masked_fill(real == 0, -100)
    kwargs = {"attention_mask": real, "labels": labels}
    assert torch.isfinite(qwen(out.sequences, routed_experts=out.routed_experts, **kwargs).loss)
    lost = out.routed_experts.clone()
    lost[1, 9] = -1
    with pytest.raises(ValueError, match="sample 1: the row of position 9 is missing"):
        qwen(out.sequences, routed_experts=lost, **kwargs)
    labels[1, 10] = -100  # later predictions attend to it all the same
    with pytest.raises(ValueError, match="sample 1: the row of position 9 is missing"):
        qwen(out.sequences, routed_experts=lost, **kwargs)
    labels[1, 10:] = -100
    assert torch.isfinite(qwen(out.sequences, routed_experts=lost, **kwargs).loss)


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
