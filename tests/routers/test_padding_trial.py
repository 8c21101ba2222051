"""A forward or a backward that is not that of the padded batch is found when a handle attaches, and named."""

import copy

import pytest
import torch
from engines.tiny_chat import tiny_qwen3_moe
from model_zoo import build_tiny
from oracles import give_forward
from peft import LoraConfig, get_peft_model
from routers.wrong_gradients import with_gradient_times

from trl_r3 import RouterReplay
from trl_r3.cli.experts import experts_of
from trl_r3.routers import padding_trial
from trl_r3.routers.compaction import CompactExperts
from trl_r3.routers.packing import PackedAttention
from trl_r3.routers.padding_trial import PaddingTrial
from trl_r3.routers.patches import CurrentModules
from trl_r3.routers.watchers import Watchers

ROWS = 39  # of the trial, with padding


def wrong_in_attention(model, monkeypatch):
    own = PackedAttention._attend

    def attend(self, attention, module, query, key, value, *args, **kwargs):
        value = value if query.shape[2] == 13 else with_gradient_times(2, value)
        return own(self, attention, module, query, key, value, *args, **kwargs)

    monkeypatch.setattr(PackedAttention, "_attend", attend)


def wrong_in_compaction(model, monkeypatch):
    own = CompactExperts._experts

    def experts(self, forward, args, kwargs):
        output = own(self, forward, args, kwargs)
        return with_gradient_times(2, output) if self.active.current.real is not None else output

    monkeypatch.setattr(CompactExperts, "_experts", experts)


def wrong_in_weights(model, monkeypatch):
    """Experts whose weights get another gradient with fewer rows, and whose inputs do not."""
    first = experts_of(model)[0]
    weight = first.down_proj

    def forward(own, hidden, *args, **kwargs):
        if hidden.shape[0] == ROWS:
            return own(hidden, *args, **kwargs)
        del first.down_proj
        first.down_proj = with_gradient_times(2, weight)
        output = own(hidden, *args, **kwargs)
        del first.down_proj
        first.down_proj = weight
        return output

    give_forward(first, forward)


WRONG = {
    "attention": (wrong_in_attention, "skipped by experts only: packed and padded gradients of"),
    "compaction": (wrong_in_compaction, "skipped, but kept in rollouts: packed and padded gradients of"),
    "weights": (wrong_in_weights, "kept: packed and padded gradients of layers.0.mlp.experts differ (by"),
}


@pytest.mark.parametrize(("wrong", "text"), WRONG.values(), ids=WRONG)
def test_a_wrong_backward_falls_back_by_name(wrong, text, monkeypatch):
    model = tiny_qwen3_moe()
    wrong(model, monkeypatch)
    with RouterReplay(model, padding="auto") as replay:
        assert str(replay.padding).startswith(text)
        monkeypatch.setattr(PaddingTrial, "_leaves", lambda self: pytest.fail("only once"))


@pytest.mark.parametrize("wrong", [wrong for wrong, _ in WRONG.values()], ids=WRONG)
def test_its_forward_alone_would_not_have_told(wrong, monkeypatch):
    """The wrong variant of the trial: logits only."""
    differs = PaddingTrial.differs

    def by_logits(self):
        self._expected = {"logits": self._expected["logits"]}
        return differs(self)

    monkeypatch.setattr(PaddingTrial, "differs", by_logits)
    model = tiny_qwen3_moe()
    wrong(model, monkeypatch)
    with RouterReplay(model, padding="auto") as replay:
        assert str(replay.padding) == "skipped"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_one_sequence_tells_the_next_is_no_rounding(dtype, monkeypatch):
    """Convolutions of new weights move logits by less than a half type rounds them."""
    model = build_tiny("lfm2_moe", initializer_range=0.02, dtype=dtype)
    with RouterReplay(model, padding="auto") as replay:
        assert "tokens of a packed sequence reach the logits of another" in replay.padding.why
    with RouterReplay(tiny_qwen3_moe().to(dtype), padding="auto") as replay:
        assert replay.padding.why is None
    monkeypatch.setattr(padding_trial, "_reaches_first", lambda values: False)  # the wrong variant
    with RouterReplay(model, padding="auto") as replay:
        assert replay.padding.why is None


def frozen(model):
    return model.requires_grad_(False)


def adapted(model):
    return get_peft_model(
        model,
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"], lora_dropout=0.0),
    )


@pytest.mark.parametrize("change", [lambda model: model, frozen, adapted], ids=["whole", "frozen", "adapted"])
def test_nothing_stays_of_it(change):
    model = change(tiny_qwen3_moe().train())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    state = torch.get_rng_state()
    with RouterReplay(model, padding="auto") as replay:
        assert replay.padding.why is None
        assert model.training and torch.equal(torch.get_rng_state(), state)
        assert all(value.grad is None for value in model.parameters())
        assert [name for name, value in model.named_parameters() if value.requires_grad] == trained
        hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
        assert not any(hooks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def values_of(model):
    with RouterReplay(model) as replay:
        watchers = Watchers(model, CurrentModules(replay.stack), [router.module for router in replay.routers])
        trial = PaddingTrial(model, replay, watchers)
        assert trial.pad() is None
        return trial._expected


def test_what_is_compared():
    first = ["logits", "gradients of the first hidden states"]
    values = values_of(tiny_qwen3_moe())
    assert [*values] == [*first, "gradients of layers.0.self_attn.q_proj", "gradients of layers.0.mlp.experts"]
    assert all(value is not None and value.abs().max() > 0 for each in values.values() for value in each)
    assert [each[0].shape[0] for each in values.values()][:2] == [23, 23]  # real tokens
    assert [*values_of(frozen(tiny_qwen3_moe()))] == first
    of_adapter = [*values_of(adapted(tiny_qwen3_moe()))]
    assert any("q_proj.lora_A" in name for name in of_adapter)
    assert of_adapter[-1] == "gradients of layers.0.mlp.experts"


def test_no_backward_where_only_an_engine_may_go_back():
    """ZeRO-3 partitions weights and names them; a whole training under it is among the sharded ones."""
    model = tiny_qwen3_moe()
    next(model.parameters()).ds_id = 0
    assert [*values_of(model)] == ["logits"]
    with RouterReplay(model, padding="auto") as replay:
        assert str(replay.padding) == "skipped"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_as_it_does(dtype):
    """A prepared model computes in a coarser type than its weights and logits have."""
    model = tiny_qwen3_moe()
    own = model.forward

    def forward(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            output = own(*args, **kwargs)
        output.logits = output.logits.float()
        return output

    model.forward = forward
    with RouterReplay(model, padding="auto") as replay:
        assert replay.padding.why is None


def test_a_live_backward_after_attaching_is_none_of_a_replay():
    """A checkpoint that replay does not know is an error only where something was replayed."""
    model = tiny_qwen3_moe()
    with RouterReplay(model, padding="auto"):
        ids = torch.arange(10).view(2, 5)

        def whole(embeds):
            return model.model.layers[0].mlp(embeds)

        hidden = torch.randn(2, 5, model.config.hidden_size, requires_grad=True)
        torch.utils.checkpoint.checkpoint(whole, hidden, use_reentrant=False).sum().backward()
        assert hidden.grad is not None
        copy.deepcopy(model)(ids)
