"""Models of the launches, and what the launches leave behind, which two test files read."""

from __future__ import annotations

import json

import pytest
from engines.fake_vllm import fake_vllm
from engines.tiny_chat import make_tokenizer, tiny_qwen3_moe
from peft import LoraConfig, get_peft_model
from sharded.cases import launches
from sharded.launching import Results, once, shared_folder
from sharded.train_biased import biased_deepseek
from transformers import Qwen3Config, Qwen3ForCausalLM

# as users of Transformers have it; the threshold lets DeepSpeed partition weights as small as these
ZERO3 = {
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Models, an adapter of one that says something, and DeepSpeed's settings; here the launches write."""
    folder = shared_folder(tmp_path_factory, "sharded")
    with once(folder / "models") as first:
        if first:
            tiny_qwen3_moe().save_pretrained(folder / "model")
            tiny_qwen3_moe(1).save_pretrained(folder / "teacher")
            make_tokenizer().save_pretrained(folder / "teacher")
            base = tiny_qwen3_moe()
            base.name_or_path = str(folder / "model")
            adapter = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
            adapter.save_pretrained(folder / "adapter")
            sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
            dense = Qwen3Config(**sizes, head_dim=16, num_attention_heads=2, num_key_value_heads=2)
            Qwen3ForCausalLM(dense).save_pretrained(folder / "dense")
            biased_deepseek().save_pretrained(folder / "biased")
            (folder / "zero3.json").write_text(json.dumps(ZERO3))
    return folder


@pytest.fixture(scope="session")
def results(folder):
    """What each rank reports of a case, by its name."""
    with fake_vllm() as server:
        yield Results(folder, launches(server.base_url))
