"""Training without a rollout, with trainers that know nothing of this package: each recompute repeats its forward."""

from __future__ import annotations

import warnings

import pytest
import torch
from datasets import Dataset
from noisy import add_noise
from oracles import as_sets, changed_rows
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_r3 import enable_routing_replay
from trl_r3._compat import without_checkpointing
from trl_r3.cli.demo.policy import build_tokenizer
from trl_r3.cli.experts import executed_ids

(CHECKPOINTING,) = without_checkpointing()  # the name of the argument
TEXTS = ["12+34=46", "1+2=3", "55+5=60", "7+70=77"]


def settings(tmp_path, kind):
    return {
        "output_dir": str(tmp_path),
        CHECKPOINTING: True,
        "gradient_checkpointing_kwargs": {"use_reentrant": kind == "reentrant"},
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "bf16": False,
        "disable_tqdm": True,
    }


def saved(model, tmp_path):
    """With noise, and a name: TRL loads its processor or its reference from there."""
    model.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    add_noise(model)
    return model


def plain(model, arguments):
    ids = build_tokenizer()(TEXTS, padding=True, return_token_type_ids=False)
    rows = [
        {"input_ids": i, "attention_mask": m, "labels": i}
        for i, m in zip(ids["input_ids"], ids["attention_mask"], strict=True)
    ]
    return Trainer(model, TrainingArguments(**arguments, remove_unused_columns=False), train_dataset=rows)


def sft(model, arguments, **more):
    data = Dataset.from_dict({"text": TEXTS})
    return SFTTrainer(model, SFTConfig(**arguments), train_dataset=data, processing_class=build_tokenizer(), **more)


def sft_with_lora(model, arguments):
    return sft(model, arguments, peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]))


def dpo(model, arguments):
    columns = {"prompt": ["12+34=", "1+2="], "chosen": ["46", "3"], "rejected": ["47", "12"]}
    return DPOTrainer(
        model,
        args=DPOConfig(**arguments),
        train_dataset=Dataset.from_dict(columns),
        processing_class=build_tokenizer(),
    )


def pairs_of(seen):
    """What each forward of a layer that builds a graph executed, and its recompute."""
    for calls in seen.values():
        sizes = [len(call) for call in calls]
        # a step is a forward and its recompute; a reference scores before, under no graph, and is not recomputed
        per_step = len(calls) // 2
        assert len(calls) == 2 * per_step and per_step in (2, 3), sizes
        for step in (0, per_step):
            yield calls[step + per_step - 2], calls[step + per_step - 1]


@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize("make", [plain, sft, sft_with_lora, dpo], ids=lambda make: make.__name__)
def test_recomputes_repeat_their_forward(qwen3, tmp_path, make, kind):
    model = saved(qwen3(), tmp_path)
    trainer = make(model, settings(tmp_path, kind))
    enable_routing_replay(trainer.model, steady_recompute=True)
    with warnings.catch_warnings(), executed_ids(model) as seen:
        warnings.filterwarnings("error", "a loss is computed with live routing")
        trainer.train()
    pairs = list(pairs_of(seen))
    assert len(pairs) == 2 * len(seen) > 0
    assert all(torch.equal(as_sets(forward), as_sets(recompute)) for forward, recompute in pairs)


@pytest.mark.parametrize("make", [sft, sft_with_lora, dpo], ids=lambda make: make.__name__)
def test_recomputes_repeat_a_selection_that_lags(qwen3, tmp_path, make):
    """DPO's reference, which builds no graph, routes live."""
    model = saved(qwen3(), tmp_path)
    trainer = make(model, settings(tmp_path, "non-reentrant"))
    enable_routing_replay(trainer.model, lag=1)
    with executed_ids(model) as seen:
        trainer.train()
    pairs = list(pairs_of(seen))
    assert len(pairs) == 2 * len(seen) > 0
    assert all(torch.equal(as_sets(forward), as_sets(recompute)) for forward, recompute in pairs)


def test_without_it_they_do_not(qwen3, tmp_path):
    model = saved(qwen3(), tmp_path)
    trainer = plain(model, settings(tmp_path, "reentrant"))
    with executed_ids(model) as seen:
        trainer.train()
    assert any(changed_rows(forward, recompute).any() for forward, recompute in pairs_of(seen))
