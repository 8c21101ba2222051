"""A step of a model whose routers have a selection bias, a buffer, under a config that users are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from engines.tiny_chat import VOCAB_SIZE, make_tokenizer
from sharded.train_sharded import let_accelerate_read_fsdp
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from trl_r3 import R3GRPOConfig, R3GRPOTrainer


def biased_deepseek() -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
            first_k_dense_replace=1, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8,
            num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1, q_lora_rank=16, kv_lora_rank=16,
            qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16, max_position_embeddings=64, eos_token_id=1,
            pad_token_id=0,
        )
    )  # fmt: skip
    bias_of(model).copy_(torch.linspace(-0.1, 0.1, 8))
    return model


def bias_of(model: Any) -> torch.Tensor:
    return model.model.layers[1].mlp.gate.e_score_correction_bias


def run(folder: Path, name: str, options: list[str]) -> dict[str, Any]:
    """What a rank has trained and replayed, and the bias that it holds."""
    args = R3GRPOConfig(
        str(folder / name), use_cpu=True, bf16=False, per_device_train_batch_size=4, num_generations=2,
        max_completion_length=8, max_steps=1, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, use_routing_replay=True, model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
    )  # fmt: skip
    let_accelerate_read_fsdp()
    trainer = R3GRPOTrainer(
        model=str(folder / "biased"),
        args=args,
        reward_funcs=lambda completion_ids, **kwargs: [float(len(set(ids))) for ids in completion_ids],
        train_dataset=Dataset.from_dict({"prompt": ["t30 t31 t32", "t40"] * 8}),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    (log,) = (log for log in trainer.state.log_history if "loss" in log)
    model = trainer.accelerator.unwrap_model(trainer.model)
    report = {
        "kind": trainer.accelerator.distributed_type.value,
        "steps": trainer.state.global_step,
        "replayed": log["routing_replay/replayed_frac"],
        "bias": bias_of(model).tolist(),
    }
    trainer.accelerator.free_memory()
    return report
