"""Every mixture-of-experts model type of the installed Transformers, through the same tests."""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
import torch
import transformers
from model_zoo import MOE_MODEL_TYPES, build_tiny
from oracles import CHECKPOINTING, as_sets, differing, foreign_record, gradients, use_checkpointing
from packaging.version import Version
from supported_models import MODEL_TYPES, PAGE, examine, listed_types, render
from transformers import CONFIG_MAPPING

from trl_r3 import RouterReplay, UnsupportedRouterError, enable_routing_replay
from trl_r3.cli.experts import experts_of
from trl_r3.records.sources import WholeBatch

REFUSED = {
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion has routers in 2 stacks of layers",
    "doge": "DogeForCausalLM has no module named `experts`, .* `torch.topk` in DogeCDMoE",
    "inkling2_loop": r"layers\.1\.mlp\.gate \(Inkling2LoopTopKRouter\) ran 2 times in one forward",
    "inkling2_loop_text": r"layers\.1\.mlp\.gate \(Inkling2LoopTopKRouter\) ran 2 times in one forward",
    "jetmoe": "JetMoeForCausalLM has 3 modules named `experts` .* called none of them",
    "phimoe": r"PhimoeSparseMoeBlock.* without a `torch.topk`.* router \(PhimoeTopKRouter\)",
}
PAGE_TEXT = PAGE.read_text(encoding="ascii")
(PAGE_VERSION,) = re.findall(r"of Transformers (\S+) that", PAGE_TEXT)
ON_PAGE = listed_types()
# Types that a Transformers older than the page may have in another form, or in one that raises by itself
CHANGED = {"aria", "aria_text", "diffusion_gemma", "doge", "glm5_next", "qwen4_exp", "qwen4_exp_text"}
IS_OLDER = Version(transformers.__version__) < Version(PAGE_VERSION)
KNOWN = {*ON_PAGE, *REFUSED} - (CHANGED if IS_OLDER else set())
LISTED = [model_type for model_type in MODEL_TYPES if model_type in KNOWN]
TRIED = [model_type for model_type in MODEL_TYPES if model_type not in KNOWN]
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


# Inkling2 keeps its routers in float32, but before 5.24 a model that is built from its config has all of it cast
CASTS_ALL = Version(transformers.__version__) < Version("5.24")
DTYPES = [
    (model_type, dtype)
    for model_type in SUPPORTED
    for dtype in (torch.float32, torch.bfloat16)
    if not (CASTS_ALL and dtype is torch.bfloat16 and model_type in ("inkling2", "inkling2_text"))
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


@pytest.mark.parametrize("model_type", [model_type for model_type in LISTED if model_type in REFUSED])
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
    assert len(causal) >= (45 if IS_OLDER else 55)
    assert sorted(SUPPORTED) == sorted(t for t in LISTED if examine(t).refusal is None)


class NotTried(Exception):
    """Nothing can be said about replay on this model type."""


def trial(model_type, ids):
    """
    What replay makes of a model type that nobody has looked at: that it is right, or the error that says it is not.

    An `AssertionError` means that replay was wrong without a word.
    """
    try:
        model = build_tiny(model_type).train()
        logits, grads = backward(model, ids)
        again_logits, again_grads = backward(model, ids)
    except Exception as error:
        raise NotTried(f"not tried, for it does not run so small: {named(error)}") from error
    if not torch.equal(again_logits, logits) or differing(again_grads, grads):
        raise NotTried("not tried, for two live passes differ")
    try:
        replay = enable_routing_replay(model)
        record = own_record(model, replay, ids)
        own_logits, own_grads = backward(model, ids, routed_experts=record)
        executed = Executed(model, replay)
        foreign = foreign_record(replay, *ids.shape)
        foreign_logits, foreign_grads = backward(model, ids, routed_experts=foreign)
        mask = executed.all(ids)
    except Exception as error:  # noqa: BLE001
        return f"refused, {named(error)}"
    assert torch.equal(own_logits, logits) and differing(own_grads, grads) == [], "its own record changes bits"
    assert torch.equal(mask, expected_mask(model_type, foreign, replay.num_experts)), "foreign experts did not run"
    assert not torch.equal(foreign_logits, logits), "the experts that ran do not matter"
    outcome = "replayed"
    for kind in CHECKPOINTING[1:]:
        try:
            again_grads = recomputed(model, kind, ids, foreign, grads)
        except Exception as error:  # noqa: BLE001
            outcome += f"; with {kind} checkpointing refused, {named(error)}"
            continue
        if again_grads is not None:
            assert differing(again_grads, foreign_grads, rtol=1e-5) == [], "a recompute ran other experts"
    return outcome


def named(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def recomputed(model, kind, ids, record, live_grads):
    """The gradients of a replayed pass with checkpointing, if the model is right with it when live."""
    use_checkpointing(model, kind)
    gradients(model)  # what a backward that raised has left
    _, grads = backward(model, ids)
    if differing(grads, live_grads, rtol=1e-5):
        return None
    return backward(model, ids, routed_experts=record)[1]


@pytest.mark.parametrize("model_type", ["qwen3_moe", *TRIED])
def test_types_of_other_versions_are_right_or_refused(model_type, ids, record_property):
    """
    What a newer Transformers adds is tried and reported at the end of the run. It may not build so small, or raise,
    but not be replayed wrongly.
    """
    try:
        outcome = trial(model_type, ids)
    except NotTried as error:
        outcome = str(error)
    if model_type in TRIED:
        record_property("model type", f"{model_type}: {outcome}")
    assert model_type in TRIED or outcome == "replayed"


def replays_nothing(monkeypatch):
    monkeypatch.setattr(RouterReplay, "replay_from", lambda self, source: nullcontext())


def replays_other_experts(monkeypatch):
    check = WholeBatch.of
    other = classmethod(lambda cls, ids, layout: check((ids + 1) % layout.num_experts, layout))
    monkeypatch.setattr(WholeBatch, "of", other)


def recomputes_live(monkeypatch):
    monkeypatch.setattr("trl_r3.routers.patches.checkpoint_functions", lambda modules: [])
    monkeypatch.setattr("trl_r3.routers.router_replay.in_backward", lambda: False)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (replays_nothing, "foreign experts did not run"),
        (replays_other_experts, "its own record changes bits"),
        (recomputes_live, "a recompute ran other experts"),
    ],
)
def test_a_trial_tells_wrong_replay(wrong, what, ids, monkeypatch):
    assert trial("mixtral", ids) == "replayed"
    wrong(monkeypatch)
    with pytest.raises(AssertionError, match=what):
        trial("mixtral", ids)


@pytest.mark.parametrize("error", [ValueError("too small"), NotImplementedError("no")])
def test_a_trial_reports_what_raises(error, ids, monkeypatch):
    def fails(*args, **kwargs):
        raise error

    assert trial("phimoe", ids).startswith("refused, UnsupportedRouterError: model.layers.0.mlp")
    monkeypatch.setattr(RouterReplay, "replay_from", fails)
    assert trial("mixtral", ids) == f"refused, {type(error).__name__}: {error}"
    monkeypatch.setattr("test_families.build_tiny", fails)
    with pytest.raises(NotTried, match=str(error)):
        trial("mixtral", ids)


def test_no_type_of_the_page_is_lost():
    """Each type that this Transformers still has is among those that are tested."""
    assert len(ON_PAGE) == len(set(ON_PAGE)) > 70
    assert [t for t in ON_PAGE if t in CONFIG_MAPPING and t not in MODEL_TYPES] == []


def test_types_that_reuse_the_class_of_another_are_found():
    """Whatever experts a type has, in the file of its own name or elsewhere."""
    sarvam = [t for t in CONFIG_MAPPING if t.startswith("sarvam")]
    assert set(sarvam) <= set(MODEL_TYPES)
    assert "aria_text" in MODEL_TYPES and "exaone" not in MODEL_TYPES and "llama" not in MODEL_TYPES


def test_a_layer_that_is_visited_twice_is_refused(qwen):
    """As in models that loop over some of their layers, which exist from Transformers 5.24 on."""
    qwen.model.layers[2] = qwen.model.layers[1]
    with pytest.raises(UnsupportedRouterError, match=r"layers\.1\.mlp\.gate .* ran 2 times in one forward"):
        RouterReplay(qwen)


def test_page_is_of_the_pinned_version():
    """So that CI, which installs that one, checks every line of it."""
    pins = (PAGE.parents[1] / "constraints.txt").read_text(encoding="ascii").splitlines()
    assert f"transformers=={PAGE_VERSION}" in pins


def test_page_is_up_to_date():
    if transformers.__version__ != PAGE_VERSION:
        pytest.skip(f"the page is that of Transformers {PAGE_VERSION}, and {transformers.__version__} is installed")
    assert render() == PAGE_TEXT, "run `python tests/supported_models.py`"
