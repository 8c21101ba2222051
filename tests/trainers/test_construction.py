"""What fails while a trainer is built, before an engine is, instead of in the middle of a run."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from engines.tiny_chat import make_trainer
from peft import PromptTuningConfig
from trainers.watching import distinct_characters, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, SFTTrainer
from trl.experimental.distillation import DistillationTrainer

from trl_r3 import R3GRPOConfig, R3GRPOTrainer, RouterReplay, UnsupportedRouterError
from trl_r3.trainers.construction import check_shards
from trl_r3.trainers.mixin import RoutingReplayMixin


class OfSFT(RoutingReplayMixin, SFTTrainer):
    pass


class OfDistillation(RoutingReplayMixin, DistillationTrainer):
    pass


@pytest.mark.parametrize(
    ("trainer", "parent"),
    [(OfSFT, "SFTTrainer has no _generate_single_turn"), (OfDistillation, "DistillationTrainer")],
)
def test_parent_without_the_seams_is_refused_by_name(trainer, parent):
    with pytest.raises(TypeError, match=f"{trainer.__name__} cannot replay: its parent {parent}"):
        trainer(model="none")


def test_prompt_tuning_is_refused_at_construction(qwen3, build):
    with pytest.raises(UnsupportedRouterError, match="learns a prompt"):
        build(qwen3(), peft_config=PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))


@pytest.fixture
def dense(tmp_path):
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    model.save_pretrained(tmp_path / "dense")
    return str(tmp_path / "dense")


@pytest.mark.parametrize("by_name", [True, False])
def test_dense_models_are_refused_before_an_engine_is_built(build, dense, by_name):
    model = dense if by_name else LlamaForCausalLM.from_pretrained(dense)
    with pytest.raises(UnsupportedRouterError, match="LlamaForCausalLM is a dense model"):
        build(model, use_vllm=True)  # which is not installed here: that would be the next error


def test_torch_compile_is_refused_before_an_engine_is_built(qwen3, build):
    with pytest.raises(ValueError, match="`torch_compile=True` runs past routing replay"):
        build(qwen3(), use_vllm=True, torch_compile=True)


@pytest.mark.parametrize(
    ("switch", "what"), [("use_routing_replay", "routing replay"), ("use_sampling_mask_replay", "sampling masks")]
)
def test_a_compiler_of_accelerate_is_refused(qwen3, build, monkeypatch, switch, what):
    """`accelerate config` asks for one, and launches with what it was told."""
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    try:
        with pytest.raises(ValueError, match=f"`dynamo_backend: EAGER` of Accelerate runs past {what}"):
            build(qwen3(), **{"use_routing_replay": False, switch: True})
        build(qwen3(), use_routing_replay=False)
    finally:
        AcceleratorState._reset_state()


def dense_qwen3():
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=96,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )
    )


def test_the_first_fsdp_is_refused():
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1)))
    with pytest.raises(ValueError, match=r"`fsdp_version` is 1, routing replay needs 2.*Set `fsdp_version: 2`"):
        check_shards(accelerator)
    accelerator.state.fsdp_plugin.fsdp_version = 2
    check_shards(accelerator)


def test_dense_model_is_refused_at_construction(build):
    with pytest.raises(UnsupportedRouterError, match="dense"):
        build(dense_qwen3())
    build(dense_qwen3(), use_routing_replay=False)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("torch_compile", {"torch_compile": True}),
        ("num_beams", {"generation_kwargs": {"num_beams": 2}}),
        ("use_cache", {"generation_kwargs": {"use_cache": False}}),
        ("prompt_lookup_num_tokens", {"generation_kwargs": {"prompt_lookup_num_tokens": 2}}),
        ("guidance_scale", {"generation_kwargs": {"guidance_scale": 1.5}}),
    ],
)
def test_rollouts_that_cannot_be_recorded_are_refused_at_construction(qwen3, build, name, changes):
    with pytest.raises(ValueError, match=name):
        build(qwen3(), **changes)


def test_model_attached_elsewhere_is_refused(qwen3, build):
    model = qwen3()
    replay = RouterReplay(model)
    with pytest.raises(ValueError, match="already"):
        build(model)
    replay.remove()
    build(model)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_without_vllm_the_install_line_is_given(tmp_path, mode):
    with pytest.raises(ImportError, match=r"pip install 'trl\[vllm\]'"):
        make_trainer(tmp_path, Dataset.from_dict({"prompt": ["t30"]}), use_vllm=True, vllm_mode=mode)


def trainer_with(config, model):
    return R3GRPOTrainer(
        model=model,
        args=config,
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": ["ab"] * 8}),
        processing_class=make_tokenizer(),
    )


@pytest.mark.parametrize("config", [GRPOConfig, R3GRPOConfig])
def test_a_trainer_without_the_switch_says_so_once(qwen3, tmp_path, config):
    given = config(str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=1, num_generations=2)
    says = f"R3GRPOTrainer was given a {config.__name__} without `use_routing_replay=True`, so nothing is replayed"
    with pytest.warns(RuntimeWarning, match=says) as caught:
        trainer = trainer_with(given, qwen3())
    assert sum("use_routing_replay" in str(each.message) for each in caught) == 1
    assert next(each for each in caught if "use_routing_replay" in str(each.message)).filename == __file__
    with pytest.raises(RuntimeError, match="use_routing_replay"):
        _ = trainer.routing_replay


@pytest.mark.parametrize("switch", ["use_routing_replay", "use_sampling_mask_replay"])
def test_a_trainer_with_a_switch_says_nothing(qwen3, settings, switch, recwarn):
    trainer_with(settings(**{"use_routing_replay": False, switch: True}), qwen3())
    assert not [each for each in recwarn if "use_routing_replay" in str(each.message)]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("use_routing_replay", "false", "is 'false'"),
        ("routing_replay_mode", "R2", "='R2'` replays what the old-policy forward recorded, but TRL skips"),
        ("routing_replay_shift_weight", True, "` compares the routers of an update with those of the old-policy"),
        ("routing_replay_trace_every", 0, "` is 0, but it counts steps"),
    ],
)
def test_a_value_that_was_changed_later_is_named(qwen3, settings, name, value, message):
    config = settings()
    setattr(config, name, value)
    with pytest.raises(ValueError, match=f"`{name}.*{message}"):
        trainer_with(config, qwen3())


CASTS = ".* in torch.float32, and with `bf16=True` TRL casts them to torch.bfloat16 for good"


def of_batches(model, settings, **changes):
    config = {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 256},
    }
    return R3GRPOTrainer(
        model=model,
        args=settings(**config, **changes),
        reward_funcs=distinct_characters,
        train_dataset=Dataset.from_dict({"prompt": ["1+2=", "x"] * 8}),
        processing_class=make_tokenizer(),
    )


def test_weights_that_continuous_batching_casts_for_good_are_told(qwen3, settings, recwarn):
    with pytest.warns(RuntimeWarning, match=CASTS):
        trainer = of_batches(qwen3(), settings, bf16=True)
    with suppress(RuntimeError):  # of Transformers 5.24, which batches no bfloat16 on a CPU; the cast comes before
        trainer.train()
    assert {value.dtype for value in trainer.model.state_dict().values()} == {torch.bfloat16}, "TRL casts nothing"


@pytest.mark.parametrize(("dtype", "bf16"), [(torch.bfloat16, True), (torch.float32, False)])
def test_weights_that_stay_are_not(qwen3, settings, recwarn, dtype, bf16):
    of_batches(qwen3().to(dtype), settings, bf16=bf16)
    assert not [each for each in recwarn if "for good" in str(each.message)]
