"""Hooks of libraries that look at the shape of a batch, and what PEFT leaves behind without a backward."""

from __future__ import annotations

import pytest
import torch
from engines.tiny_chat import tiny_qwen3_moe
from oracles import foreign_record
from peft import LoraConfig, get_peft_model
from transformers.integrations.neftune import activate_neftune, deactivate_neftune
from transformers.modeling_layers import GradientCheckpointingLayer

from trl_r3 import RouterReplay
from trl_r3.routers import watchers
from trl_r3.routers._compat_routers import forwards_alone

INVOKES = 5
MASK = torch.tensor([[0] * 2 + [1] * 7 + [0] * 7, [1] * 9 + [0] * 7])
IDS = ((torch.arange(32).reshape(2, 16) * 7 + 3) % 100 + 10).index_fill(1, torch.tensor([4]), INVOKES)


def activated():
    """An adapter that acts from one token on, which PEFT counts from the last column."""
    torch.manual_seed(0)
    adapter = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        alora_invocation_tokens=[INVOKES],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    return get_peft_model(tiny_qwen3_moe(), adapter)


def logits(model, padding):
    with RouterReplay(model, padding=padding) as replay, torch.no_grad():
        with replay.replay(foreign_record(replay, *IDS.shape)):
            found = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[MASK.bool()]
        return found, str(replay.padding)


def test_an_adapter_that_counts_from_the_last_column_keeps_it():
    model = activated()
    padded, _ = logits(model, "keep")
    found, said = logits(model, "auto")
    assert torch.equal(found, padded)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, "keep")[0], padded, atol=1e-3), "it acts on nothing"
    assert "_alora_offsets_pre_forward_hook watches base_model.model.model.layers.0.self_attn.q_proj" in said
    assert not any(module._forward_pre_hooks for module in model.modules()), "of a trial that raised"


def test_without_a_look_at_it_other_tokens_are_adapted(monkeypatch):
    """The wrong variant."""
    model = activated()
    padded, _ = logits(model, "keep")
    monkeypatch.setattr(watchers, "depends_on_shape", lambda hook: False)
    assert not torch.allclose(logits(model, "auto")[0], padded, atol=1e-3)


def test_noise_by_the_width_of_a_batch_keeps_it():
    """NEFTune divides its noise by the root of the width, which is that of all sequences in one that is packed."""
    model = tiny_qwen3_moe()
    with RouterReplay(model, padding="auto") as replay:
        assert str(replay.padding) == "skipped"
        handle = activate_neftune(model, 5.0)
        assert "neftune_post_forward_hook watches model.embed_tokens" in str(replay.padding)
        deactivate_neftune(model, handle)
        assert str(replay.padding) == "skipped"


def test_a_checkpointed_model_with_such_an_adapter_can_be_attached_to():
    model = activated()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    with RouterReplay(model.train(), padding="auto") as replay, replay.replay(foreign_record(replay, *IDS.shape)):
        model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits.sum().backward()
    assert layers and all(layer.gradient_checkpointing and not layer._forward_pre_hooks for layer in layers)


def checkpointed(model):
    return [name for name, layer in model.named_modules() if vars(layer).get("gradient_checkpointing")]


def test_what_is_set_to_be_checkpointed_is_so_again_after_an_error():
    model = tiny_qwen3_moe()
    model.gradient_checkpointing_enable()
    before = checkpointed(model)
    with pytest.raises(KeyError), forwards_alone(model):
        assert before and not checkpointed(model)
        raise KeyError
    assert checkpointed(model) == before
