"""Weights of an adapter on their way to vLLM: merged ones are sent, and the base stays bit for bit what it was."""

from __future__ import annotations

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
from engines.fake_vllm import fake_vllm
from engines.tiny_chat import tiny_qwen3_moe
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from trl.generation import vllm_client
from trl.generation.vllm_generation import VLLMGeneration

from trl_r3.engines.weight_sync import adapted_weights, keep_base, merged_copies

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    "experts alone": {"target_modules": [], "target_parameters": EXPERTS},
    "router": {"target_modules": ["o_proj"], "target_parameters": ["mlp.gate.weight"], "use_rslora": True},
    "saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "embeddings": {"target_modules": ["embed_tokens"]},
    "norms": {"target_modules": ["q_proj"], "use_dora": True},
    "bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "tied": {"target_modules": ["embed_tokens", "q_proj"]},
}
CPU = torch.device("cpu")


def adapted(what: str, dtype: torch.dtype, **settings) -> PeftModel:
    """A policy whose adapter says something."""
    own = {"bias": {"attention_bias": True}, "tied": {"tie_word_embeddings": True}}.get(what, {})
    model = tiny_qwen3_moe(**own).to(dtype)
    policy = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **ADAPTERS[what], **settings))
    for name, parameter in policy.named_parameters():
        if "lora_" in name:  # experts get zeros whatever is set
            nn.init.normal_(parameter, std=0.1)
    return policy


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


@pytest.fixture
def sending(server_trainer, monkeypatch):
    """TRL's own generation of a trainer on a policy, and a list of what it sends."""

    def make(fake, policy, **settings):
        trainer = server_trainer(fake, model=policy, routing_replay_alarm="off", **settings)
        sent: list[dict[str, torch.Tensor]] = []

        def update(client, metadata, params):
            found = [(name, param.clone()) for name, param in params]
            assert [(n, str(p.dtype).removeprefix("torch."), list(p.shape)) for n, p in found] == metadata
            sent.append(dict(found))

        monkeypatch.setattr(vllm_client.VLLMClient, "update_named_params", update)
        return trainer, sent

    return make


@pytest.fixture
def fake():
    with fake_vllm() as server:
        yield server


def test_the_base_outlives_a_hundred_syncs(sending, fake):
    trainer, sent = sending(fake, adapted("attention", torch.bfloat16))
    policy, generation = trainer.model, trainer.vllm_generation
    bases = {name: value for name, value in weights(policy).items() if "base_layer" in name}

    def changed() -> float:
        after = weights(policy)
        different = sum(int((after[name] != value).sum()) for name, value in bases.items())
        return different / sum(value.numel() for value in bases.values())

    def update() -> None:
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.data += 0.01 * torch.randn_like(parameter)

    for _ in range(100):
        update()
        generation.sync_weights()
        assert changed() == 0
        assert_same(sent.pop(), weights(copy.deepcopy(policy).merge_and_unload()))
    shares = []
    for _ in range(10):
        update()
        VLLMGeneration.sync_weights(generation)
        shares.append(changed())
    assert 0.1 < shares[0] < 0.5 * shares[-1], "TRL alone restores this base, so that it shows nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("what", ADAPTERS)
def test_what_is_sent_is_merged(sending, fake, what, dtype):
    trainer, sent = sending(fake, adapted(what, dtype))
    before, expected = weights(trainer.model), weights(copy.deepcopy(trainer.model).merge_and_unload())
    own = {name.removeprefix("base_model.model.").replace(".base_layer", ""): value for name, value in before.items()}
    assert any(not torch.equal(own[name], expected[name]) for name in expected if name in own), "it says nothing"
    trainer.vllm_generation.sync_weights()
    assert_same(sent[0], expected)
    assert_same(weights(trainer.model), before)
    layers = [module for module in trainer.model.modules() if hasattr(module, "merged_adapters")]
    assert layers and not any(layer.merged_adapters or getattr(layer, "_caches", None) for layer in layers)


def test_what_is_sent_is_base_and_product(sending, fake):
    """By the definition of LoRA, in float32, to what bfloat16 rounds away."""
    trainer, sent = sending(fake, adapted("attention", torch.bfloat16, lora_alpha=12))
    trainer.vllm_generation.sync_weights()
    own = weights(trainer.model)
    for layer in range(4):
        for module in ("q_proj", "v_proj"):
            place = f"layers.{layer}.self_attn.{module}"
            at = f"base_model.model.model.{place}"
            a, b = own[f"{at}.lora_A.default.weight"].float(), own[f"{at}.lora_B.default.weight"].float()
            expected = own[f"{at}.base_layer.weight"].float() + 12 / 4 * b @ a
            assert (expected - own[f"{at}.base_layer.weight"].float()).abs().max() > 0.1
            torch.testing.assert_close(sent[0][f"model.{place}.weight"].float(), expected, rtol=2**-8, atol=0)


def test_float32_is_sent_as_by_trl(sending, fake):
    trainer, sent = sending(fake, adapted("experts", torch.float32))
    trainer.vllm_generation.sync_weights()
    VLLMGeneration.sync_weights(trainer.vllm_generation)
    assert_same(*sent)


@pytest.mark.parametrize("what", ["attention", "experts"])
def test_what_is_packed_after_the_last_was_read_is_merged(sending, fake, monkeypatch, what):
    """TRL's client packs the last GB when all is read, and TRL has taken the adapter out of its tensors by then."""
    trainer, _ = sending(fake, adapted(what, torch.float32))
    expected, held = weights(copy.deepcopy(trainer.model).merge_and_unload()), list[dict[str, torch.Tensor]]()

    def hold(client, metadata, params):
        held.append(dict(params))

    monkeypatch.setattr(vllm_client.VLLMClient, "update_named_params", hold)
    trainer.vllm_generation.sync_weights()
    VLLMGeneration.sync_weights(trainer.vllm_generation)
    assert_same(held[0], expected)
    with pytest.raises(AssertionError, match="self_attn.q_proj.weight"):
        assert_same(held[1], expected)


def test_an_exception_leaves_the_policy_as_it_was(sending, fake, monkeypatch):
    trainer, sent = sending(fake, adapted("experts", torch.bfloat16))
    policy, before, own = trainer.model, weights(trainer.model), set(vars(trainer.model))

    def fail(client, metadata, params):
        for index, _ in enumerate(params):
            if index == 12:
                raise ConnectionError("the server is gone")

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(vllm_client.VLLMClient, "update_named_params", fail)
        trainer.vllm_generation.sync_weights()
    assert set(vars(policy)) == own
    assert_same(weights(policy), before)
    trainer.vllm_generation.sync_weights()
    assert_same(sent[0], weights(copy.deepcopy(policy).merge_and_unload()))


def test_a_merge_that_fails_leaves_the_policy_as_it_was(sending, fake, monkeypatch):
    trainer, _ = sending(fake, adapted("norms", torch.bfloat16))
    before, layer = weights(trainer.model), trainer.model.base_model.model.model.layers[2].self_attn.q_proj
    merge = layer.merge

    def fail(*args, **kwargs):
        merge(*args, **kwargs)
        if not kwargs:  # or PEFT asks to merge none
            raise FloatingPointError("no number")

    monkeypatch.setattr(layer, "merge", fail)
    with pytest.raises(FloatingPointError):
        trainer.vllm_generation.sync_weights()
    assert_same(weights(trainer.model), before)
    assert not layer.merged_adapters and not layer._caches


def test_the_saved_adapter_is_that_of_the_saved_base(sending, fake, tmp_path):
    """What was trained with a sync before each rollout is what is loaded again."""
    trainer, sent = sending(fake, adapted("attention", torch.bfloat16), max_steps=3, num_iterations=1)
    base = tiny_qwen3_moe().to(torch.bfloat16)
    trainer.train()
    assert len(sent) >= 3
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    tokens = torch.arange(20, 60)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=tokens).logits
        assert torch.equal(loaded(input_ids=tokens).logits, expected)
        VLLMGeneration.sync_weights(trainer.vllm_generation)  # TRL alone
        assert not torch.equal(loaded(input_ids=tokens).logits, trainer.model(input_ids=tokens).logits)


def test_copies_go_as_they_are_read():
    """Two at most: the reader holds one while the next is made."""
    policy, most = adapted("experts", torch.float32), 0
    ids = {id(parameter) for parameter in policy.parameters()}
    with merged_copies(policy, CPU):
        policy.merge_adapter()
        copies: list[weakref.ref] = []
        for _, weight in policy.named_parameters():
            copies += [weakref.ref(weight)] if id(weight) not in ids else []
            most = max(most, sum(ref() is not None for ref in copies))
        policy.unmerge_adapter()
    assert len(copies) == 4 + 2 * 3 and most <= 2


def test_each_reading_is_merged():
    policy = adapted("attention", torch.float32)
    with merged_copies(policy, CPU):
        policy.merge_adapter()
        assert_same(*[weights(policy) for _ in range(2)])
        policy.unmerge_adapter()
        assert policy.parameters is not None and list(policy.parameters())[1] is list(policy.parameters())[1]


def test_what_nobody_reads_is_an_error():
    """As where TRL read the weights in another way."""
    policy = adapted("attention", torch.float32)
    with merged_copies(policy, CPU):
        policy.merge_adapter()
        list(policy.base_model.named_parameters())
        with pytest.raises(RuntimeError, match="8 layers have adapters, and not all were read"):
            policy.unmerge_adapter()


def test_what_merges_elsewhere_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    policy = get_peft_model(model, LoraConfig(r=2, target_modules=["attention", "out"]))
    with merged_copies(policy, CPU), pytest.raises(ValueError, match="1 adapters of MultiheadAttention"):
        policy.merge_adapter()


def test_weights_of_a_layer():
    policy = adapted("bias", torch.float32).base_model.model.model.layers[0]
    assert [tuple(each.shape) for each in adapted_weights(policy.self_attn.q_proj)] == [(32, 32), (32,)]
    wrapper = adapted("experts", torch.float32).base_model.model.model.layers[0].mlp.experts
    assert {each.data_ptr() for each in adapted_weights(wrapper)} == {wrapper.get_param().data_ptr()}


@pytest.mark.parametrize("adapter, version", [(True, 1), (False, 2), (False, None)])
def test_what_is_left_to_trl(adapter, version):
    """The first FSDP, and policies without an adapter."""
    model = adapted("attention", torch.float32) if adapter else tiny_qwen3_moe()
    plugin = None if version is None else SimpleNamespace(fsdp_version=version)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), device=CPU)
    generation = SimpleNamespace(model=model, accelerator=accelerator, sync_weights=weights)
    keep_base(generation)
    assert generation.sync_weights is weights
