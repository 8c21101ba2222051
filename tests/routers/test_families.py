"""Every mixture-of-experts model type of the installed Transformers, through the same tests."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from model_zoo import MOE_MODEL_TYPES, build_tiny
from oracles import CHECKPOINTING, as_sets, differing, experts_of, foreign_record, gradients, use_checkpointing
from supported_models import MODEL_TYPES, PAGE, examine, render

from trl_r3 import RouterReplay, UnsupportedRouterError, enable_routing_replay

REFUSED = {
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion has routers in 2 stacks of layers",
    "doge": "DogeForCausalLM has no module named `experts`, .* `torch.topk` in DogeCDMoE",
    "jetmoe": "JetMoeForCausalLM has 3 modules named `experts` .* called none of them",
    "phimoe": r"PhimoeSparseMoeBlock.* without a `torch.topk`.* router \(PhimoeTopKRouter\)",
}
LISTED = [model_type for model_type in MODEL_TYPES if f"| `{model_type}` |" in PAGE.read_text(encoding="ascii")]
LATER = [model_type for model_type in MODEL_TYPES if model_type not in LISTED]
SUPPORTED = [model_type for model_type in LISTED if model_type not in REFUSED]


def forward(model, ids, **kwargs):
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **kwargs)


def backward(model, ids, **kwargs):
    out = forward(model, ids, labels=ids, **kwargs)
    out.loss.backward()
    return out.logits.detach(), gradients(model)


@torch.no_grad()
def own_record(model, replay, ids):
    with replay.record() as recorded:
        forward(model, ids)
    return recorded.routed_experts


class Executed:
    """Which experts ran for each token: `(N, E)` of `bool` by decoder layer, in the last forward."""

    def __init__(self, model, replay):
        self.num_experts = replay.num_experts
        self.masks = {}
        experts = experts_of(model)
        for layer in replay.moe_layers:
            experts[layer].register_forward_pre_hook(
                lambda module, args, kwargs, layer=layer: self.note(layer, args, kwargs), with_kwargs=True
            )

    def note(self, layer, args, kwargs):
        given = [a for a in [*args, *kwargs.values()] if torch.is_tensor(a)]
        chosen = [a for a in given if not a.is_floating_point()]
        if chosen:
            assert len(chosen) == 1
            self.masks[layer] = as_mask(chosen[0], self.num_experts)
        else:  # Llama 4 feeds every expert every token, times a score that is 0 unless the expert is chosen
            self.masks[layer] = (given[0].unflatten(0, (self.num_experts, -1)) != 0).any(-1).T

    def all(self, ids):
        return torch.stack([self.masks[layer] for layer in sorted(self.masks)], 1).unflatten(0, ids.shape)


def as_mask(ids, num_experts):
    flat = ids.long().reshape(-1, ids.shape[-1])
    return torch.zeros(flat.shape[0], num_experts, dtype=torch.bool).scatter(1, flat, True)


def expected_mask(model_type, record, num_experts):
    if model_type == "zaya":  # its last choice skips the experts, by expert 0 with a weight of 0
        record = record.where(record != num_experts - 1, 0)
    masks = [
        as_mask(record[:, :, slot], num_experts).unflatten(0, record.shape[:2]) for slot in range(record.shape[2])
    ]
    return torch.stack(masks, 2)


# Inkling2 keeps its routers in float32, so that casting all of it breaks it
DTYPES = [
    (model_type, dtype)
    for model_type in SUPPORTED
    for dtype in (torch.float32, torch.bfloat16)
    if (model_type.removesuffix("_text"), dtype) != ("inkling2", torch.bfloat16)
]


@pytest.mark.parametrize(("model_type", "dtype"), DTYPES)
def test_own_record_gives_the_same_bits(model_type, dtype, ids):
    model = build_tiny(model_type, dtype=dtype).train()
    logits, grads = backward(model, ids)
    replay = enable_routing_replay(model)
    with replay.record() as recorded:
        forward(model, ids)
    record = recorded.routed_experts
    own_logits, own_grads = backward(model, ids, routed_experts=record)
    assert torch.equal(own_logits, logits)
    assert differing(own_grads, grads) == []
    other_logits, other_grads = backward(model, ids, routed_experts=foreign_record(replay, *ids.shape))
    assert not torch.equal(other_logits, logits)
    assert differing(other_grads, grads) != []


@pytest.mark.parametrize("model_type", SUPPORTED)
@torch.no_grad()
def test_foreign_record_is_executed(model_type, ids):
    model = build_tiny(model_type)
    replay = RouterReplay(model)
    executed = Executed(model, replay)
    record = foreign_record(replay, *ids.shape)
    wanted = expected_mask(model_type, record, replay.num_experts)
    live = forward(model, ids).logits
    assert (executed.all(ids) != wanted).any(-1).double().mean() > 0.5
    with replay.replay(record):
        logits = forward(model, ids).logits
    assert torch.equal(executed.all(ids), wanted)
    assert (logits - live).abs().max() > 1e-4
    replay.remove()
    assert torch.equal(forward(model, ids).logits, live)


@pytest.mark.parametrize("model_type", SUPPORTED)
@torch.no_grad()
def test_generate_returns_routes(model_type, ids):
    model = build_tiny(model_type)
    replay = enable_routing_replay(model)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        do_sample=False,
        return_dict_in_generate=True,
        output_routed_experts=True,
    )
    routes = out.routed_experts
    assert routes.shape == (2, 17, len(replay.moe_layers), replay.top_k)
    assert (routes[:, -1] == -1).all() and (routes[:, :-1] >= 0).all()
    executed = Executed(model, replay)
    forward(model, out.sequences)
    wanted = expected_mask(model_type, routes[:, :-1].long(), replay.num_experts)
    assert torch.equal(executed.all(out.sequences)[:, :-1], wanted)
    assert len(as_sets(routes[:, :-1]).flatten(0, 1).unique(dim=0)) > 5, "routes depend on the token"


@pytest.mark.parametrize("kind", CHECKPOINTING[1:])
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_checkpointing(model_type, kind, ids):
    model = build_tiny(model_type).train()
    _, live = backward(model, ids)
    replay = enable_routing_replay(model)
    record = foreign_record(replay, *ids.shape)
    _, without = backward(model, ids, routed_experts=record)
    assert differing(without, live, rtol=1e-3) != []
    use_checkpointing(model, kind)
    calls = count_calls(model, replay)
    try:
        _, grads = backward(model, ids, routed_experts=record)
    except RuntimeError as error:
        bare = build_tiny(model_type).train()
        use_checkpointing(bare, kind)
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:60])):
            backward(bare, ids)
        pytest.skip(f"Transformers {transformers.__version__} fails so without replay, too: {error}")
    assert [len(runs) for runs in calls] == [2] * len(replay.moe_layers), "each layer was recomputed"
    # some families are not bit-exact with the reentrant kind, with or without replay
    assert differing(grads, without, rtol=1e-5) == []


def count_calls(model, replay):
    """A list for each MoE layer, which grows by one with each run of its experts."""
    calls = {layer: [] for layer in replay.moe_layers}
    for layer, experts in experts_of(model).items():
        if layer in calls:
            experts.register_forward_pre_hook(lambda module, args, seen=calls[layer]: seen.append(1))
    return list(calls.values())


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_by_name_with_the_reason(model_type, ids):
    model = build_tiny(model_type)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(UnsupportedRouterError, match=REFUSED[model_type]):
        enable_routing_replay(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert re.search(REFUSED[model_type], examine(model_type).refusal)


def test_hash_routed_layers_are_left_alone(ids):
    """DeepSeek-V4 picks the experts of its first layers by token id; nothing is selected there."""
    model = build_tiny("deepseek_v4")
    replay = RouterReplay(model)
    assert 0 in experts_of(model) and replay.moe_layers == [1, 2] and replay.num_decoder_layers == 3
    seen = []
    experts_of(model)[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            next(a for a in [*args, *kwargs.values()] if not a.is_floating_point()).clone()
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        live = forward(model, ids).logits
        with replay.replay(foreign_record(replay, *ids.shape)):
            assert not torch.equal(forward(model, ids).logits, live)
    assert torch.equal(*seen)


def test_enough_families_are_supported():
    causal = [t for t in LISTED if t in MOE_MODEL_TYPES and examine(t).refusal is None]
    assert len(causal) >= 55
    assert sorted(SUPPORTED) == sorted(t for t in LISTED if examine(t).refusal is None)


@pytest.mark.parametrize("model_type", LATER)
def test_types_that_came_later_are_right_or_refused(model_type, ids):
    """What a newer Transformers adds is tried: it may not build so small, or be refused, but not be replayed "
    "wrongly."""
    try:
        model = build_tiny(model_type).train()
        logits, grads = backward(model, ids)
        replay = enable_routing_replay(model)
    except Exception as error:  # noqa: BLE001
        pytest.skip(f"{model_type} is newer than the page of model types: {type(error).__name__}: {error}")
    record = own_record(model, replay, ids)
    own_logits, own_grads = backward(model, ids, routed_experts=record)
    assert torch.equal(own_logits, logits) and differing(own_grads, grads) == []
    executed = Executed(model, replay)
    foreign = foreign_record(replay, *ids.shape)
    foreign_logits, _ = backward(model, ids, routed_experts=foreign)
    assert torch.equal(executed.all(ids), expected_mask(model_type, foreign, replay.num_experts))
    assert not torch.equal(foreign_logits, logits)


def test_page_is_up_to_date():
    page = PAGE.read_text(encoding="ascii")
    version = re.search(r"of Transformers (\S+) that", page)
    assert version is not None
    if version[1] != transformers.__version__:
        pytest.skip(f"the page lists Transformers {version[1]}, and {transformers.__version__} is installed")
    assert page == render(), "run `python tests/supported_models.py`"
