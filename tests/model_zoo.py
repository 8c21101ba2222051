"""Small random models of every mixture-of-experts causal LM of the installed Transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

UNBUILDABLE: dict[str, str] = {}

# Values by attribute name; a config takes those it has.
RULES: dict[str, Any] = {
    "vocab_size": 128,
    "unpadded_vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "max_position_embeddings": 256,
    "model_max_length": 256,
    "max_seq_len": 256,
    "hidden_size": 32,
    "d_model": 32,
    "num_hidden_layers": 3,
    "num_layers": 3,
    "n_layers": 3,
    "num_attention_heads": 4,
    "n_heads": 4,
    "swa_num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "swa_head_dim": 8,
    "kv_channels": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "intermediate_size": 32,
    "intermediate_size_mlp": 32,
    "dense_intermediate_size": 32,
    "ffn_hidden_size": 32,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "shared_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_group": 4,
    "num_expert_group": 4,
    "topk_group": 2,
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "initializer_range": 0.1,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    "index_topk": 8,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "mlp_only_layers": [0],
    "use_mamba_kernels": False,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}

LINEAR = ["linear_attention", "full_attention", "linear_attention"]

# What the rules cannot know, by the model_type of the text config.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": LINEAR},
    "cohere2_moe": {"logit_scale": 1.0},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dots3_note": {"vision_config": {"adapter_out_dim": 32}, "audio_config": {"adapter_out_dim": 32}},
    "doge": {"is_moe": True, "num_experts": 16},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
    },
    "granitemoehybrid": {"layer_types": LINEAR, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "kimi_linear": {"layer_types": LINEAR},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {"moe_layers": [1, 2], "attention_chunk_size": 8},
    "longcat_flash": {"zero_expert_num": 4},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "rotary_dim": 4,
    },
    "nemotron_h": {
        "layer_types": ["linear_attention", "mlp", "moe", "full_attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "moe_latent_size": 16,
    },
    "qwen3_5_moe_text": {"layer_types": LINEAR},
    "qwen3_next": {"layer_types": LINEAR},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}

_ROUTER = re.compile(r"(^|\.)(gate|router|router_gate)\.")
_EXPERT_BIAS = re.compile(r"(^|\.)(expert_bias|e_score_correction_bias|experts\.\w*bias)$")
_MOE_CLASS = re.compile(r"^class \w*(?:MoE|Moe|MOE|Router|Experts)\w*\(", re.MULTILINE)


def _has_experts(model_type: str) -> bool:
    module = model_type_to_module_name(model_type)
    path = Path(transformers.__file__).parent / "models" / module / f"modeling_{module}.py"
    return path.exists() and _MOE_CLASS.search(path.read_text()) is not None


MOE_MODEL_TYPES: tuple[str, ...] = tuple(t for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if _has_experts(t))


def _small(config: PreTrainedConfig) -> dict[str, Any]:
    values = {name: value for name, value in RULES.items() if name in vars(config)}
    if "kv_lora_rank" in values:
        values["num_key_value_heads"] = RULES["num_attention_heads"]
    return values | OVERRIDES.get(config.model_type, {})


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The small config of ``model_type``; ``overrides`` go to its text config."""
    cls = CONFIG_MAPPING[model_type]
    default = cls()
    text = default.get_text_config()
    small = _small(text) | overrides
    if text is default:
        return cls(**small)
    return cls(**_small(default) | {"text_config": type(text)(**small)})


@torch.no_grad()
def _spread_routing(model: PreTrainedModel) -> None:
    """Random values for what Transformers leaves constant, so that the routing varies from token to token."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        leaf = name.rpartition(".")[2]
        routing = _ROUTER.search(name) is not None
        if leaf == "tid2eid":
            experts = model.config.get_text_config().n_routed_experts
            tensor.copy_(torch.rand(tensor.shape[0], experts).topk(tensor.shape[1], dim=-1).indices)
        elif leaf == "balancing_biases":
            tensor.zero_()
        elif routing and leaf in {"weight", "scale", "per_expert_scale", "router_states_scale"} and tensor.dim() == 1:
            tensor.mul_(1 + 0.2 * torch.randn_like(tensor))
        elif routing and leaf == "weight":
            tensor.normal_(std=0.5)
        elif (routing and leaf.endswith("bias")) or _EXPERT_BIAS.search(name):
            tensor.normal_(std=0.05)


def build_tiny(model_type: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A small random model of ``model_type`` in fp32 and eval mode, the same one for the same seed."""
    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _spread_routing(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()
