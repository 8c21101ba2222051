"""Every mixture-of-experts model type of the installed Transformers is found and replayed, or refused by name."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from model_zoo import MOE_MODEL_TYPES, build_tiny
from oracles import CHECKPOINTING, as_sets, differing, foreign_record, use_checkpointing
from packaging.version import Version
from routers.families import (
    IS_OLDER,
    LISTED,
    ON_PAGE,
    PAGE_TEXT,
    PAGE_VERSION,
    REFUSED,
    SUPPORTED,
    Executed,
    backward,
    expected_mask,
    forward,
)
from routers.left_behind import same_traces, traces
from supported_models import MODEL_TYPES, PAGE, examine, render
from transformers import (
    CONFIG_MAPPING,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.bert.modeling_bert import BertLMHeadModel

from trl_r3 import RouterReplay, UnsupportedRouterError, enable_routing_replay
from trl_r3.cli.experts import experts_of

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


def test_layers_that_share_their_experts_are_refused(qwen):
    qwen.model.layers[3].mlp.experts = qwen.model.layers[1].mlp.experts
    with pytest.raises(
        UnsupportedRouterError, match=r"experts of model\.layers\.1\.mlp .* ran 2 times in one forward, .*own"
    ):
        RouterReplay(qwen)


def test_page_is_of_the_pinned_version():
    """So that CI, which installs that one, checks every line of it."""
    pins = (PAGE.parents[1] / "constraints.txt").read_text(encoding="ascii").splitlines()
    assert f"transformers=={PAGE_VERSION}" in pins


def test_page_is_up_to_date():
    if transformers.__version__ != PAGE_VERSION:
        pytest.skip(f"the page is that of Transformers {PAGE_VERSION}, and {transformers.__version__} is installed")
    assert render(PAGE_TEXT) == PAGE_TEXT, "run `python tests/supported_models.py`"


def tiny_llama():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    )


def tiny_t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4))


def tiny_bert():
    return BertLMHeadModel(
        BertConfig(
            vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
            is_decoder=True,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (tiny_llama, "LlamaForCausalLM is a dense model"),
        (tiny_bert, "BertLMHeadModel is a dense model"),
        (tiny_t5, "T5ForConditionalGeneration is an encoder-decoder"),
    ],
)
def test_model_without_routers_is_refused(build, words):
    model = build()
    before = traces(model)
    with pytest.raises(UnsupportedRouterError, match=words):
        enable_routing_replay(model)
    assert same_traces(traces(model), before)


class ByOne(torch.nn.Module):
    """Experts that are called one by one, as models had them before Transformers 5."""

    def __init__(self, gate, experts):
        super().__init__()
        self.gate, self.one = gate, experts
        self.experts = torch.nn.ModuleList(torch.nn.Identity() for _ in range(experts.num_experts))

    def forward(self, hidden):
        _, weights, ids = self.gate(hidden.flatten(0, 1))
        return self.one(hidden.flatten(0, 1), ids, weights).view_as(hidden)


def test_a_part_of_the_layers_alone_is_refused(qwen):
    """The others would route live, whatever the record says."""
    mlp = qwen.model.layers[3].mlp
    qwen.model.layers[3].mlp = ByOne(mlp.gate, mlp.experts)
    with pytest.raises(UnsupportedRouterError, match=r"1 mixtures .* beside 1 \(model\.layers\.3\.mlp\) whose"):
        RouterReplay(qwen)
