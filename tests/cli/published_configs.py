"""
What published configs of mixtures of experts say of sizes, and what the model cards and the arithmetic say of them.

Values are those of the files; what no size and no reading of them depends on is left out, towers for images, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
QWEN3 = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "max_position_embeddings": 40960, "vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645,
    "tie_word_embeddings": False, "rope_theta": 1000000.0, "rope_scaling": None, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN35 = {
    "model_type": "qwen3_5_moe_text", "hidden_size": 2048, "moe_intermediate_size": 512, "num_hidden_layers": 40,
    "shared_expert_intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_value_head_dim": 128,
    "linear_num_value_heads": 32, "full_attention_interval": 4, "num_experts": 256, "num_experts_per_tok": 8,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10, "mtp_num_hidden_layers": 1,
    "attn_output_gate": True, "vocab_size": 248320, "eos_token_id": 248044, "mamba_ssm_dtype": "float32",
    "rope_parameters": {
        "mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default", "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
    },
}  # fmt: skip
DEEPSEEK = {
    "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
    "moe_layer_freq": 1, "moe_intermediate_size": 2048, "n_group": 8, "topk_group": 4, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.5, "max_position_embeddings": 163840, "rope_theta": 10000, "tie_word_embeddings": False,
}  # fmt: skip
YARN = {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}


@dataclass(frozen=True)
class Published:
    """
    A config and what is known of its model.

    Args:
        moe_layers (`str`):
            As `check` writes them.
        experts, top_k (`int`):
            Of a layer, and of a token.
        billions (`float`):
            Of parameters, from the card of the model where it has them: without layers for multi-token prediction.
        of_experts (`int`):
            Parameters of routed experts: layers x experts x matrices x hidden x width.
        config (`dict`):
            What `config.json` says.
    """

    moe_layers: str
    experts: int
    top_k: int
    billions: float
    of_experts: int
    config: dict[str, Any]


PUBLISHED = {
    "ernie-4.5-21b-a3b": Published("27: 1-27", 64, 6, 21.9, 27 * 64 * 3 * 2560 * 1536, {
        "model_type": "ernie4_5_moe", "hidden_size": 2560, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_hidden_layers": 28, "num_attention_heads": 20, "num_key_value_heads": 4, "head_dim": 128,
        "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_k": 6, "moe_layer_start_index": 1,
        "moe_layer_end_index": 27, "moe_layer_interval": 1, "vocab_size": 103424, "tie_word_embeddings": True,
        "moe_capacity": [64, 64, 64], "moe_gate": "topk", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }),
    "hunyuan-a13b": Published("32: 0-31", 64, 8, 80.4, 32 * 64 * 3 * 4096 * 3072, {
        "model_type": "hunyuan_v1_moe", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 128167, "num_experts": 64,
        "moe_intermediate_size": [3072] * 32, "moe_topk": [8] * 32, "num_shared_expert": [1] * 32,
        "eos_token_id": 127960, "pad_token_id": 127961,
    }),
    "lfm2-8b-a1b": Published("22: 2-23", 32, 4, 8.34, 22 * 32 * 3 * 2048 * 1792, {
        "model_type": "lfm2_moe", "vocab_size": 65536, "intermediate_size": 7168, "num_dense_layers": 2,
        "use_expert_bias": True, "num_hidden_layers": 24, "hidden_size": 2048, "num_attention_heads": 32,
        "num_key_value_heads": 8, "conv_L_cache": 3, "num_experts": 32, "num_experts_per_tok": 4,
        "moe_intermediate_size": 1792, "eos_token_id": 7, "pad_token_id": 0,
        "layer_types": ["full_attention" if layer in (2, 6, 10, 14, 18, 21) else "conv" for layer in range(24)],
    }),
    "minimax-m2.5": Published("62: 0-61", 256, 8, 228.7, 62 * 256 * 3 * 3072 * 1536, {
        "model_type": "minimax_m2", "num_hidden_layers": 62, "hidden_size": 3072, "num_attention_heads": 48,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 1536, "vocab_size": 200064,
        "num_experts_per_tok": 8, "num_local_experts": 256, "rope_theta": 5000000, "rotary_dim": 64,
        "tie_word_embeddings": False, "use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True,
        "use_mtp": True, "num_mtp_modules": 3, "shared_intermediate_size": 0, "scoring_func": "sigmoid",
        "quantization_config": {**FP8, "fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate", "lm_head"]},
        "auto_map": {
            "AutoConfig": "configuration_minimax_m2.MiniMaxM2Config",
            "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM",
        },
    }),
    # its own file says "minimax_m3", which Transformers 5.23 does not have
    "minimax-m3": Published("57: 3-59", 128, 4, 426.2, 57 * 128 * 3 * 6144 * 3072, {
        "model_type": "minimax_m3_vl_text", "dense_intermediate_size": 12288, "first_k_dense_replace": 3,
        "head_dim": 128, "hidden_size": 6144, "intermediate_size": 3072, "moe_intermediate_size": 3072,
        "moe_layer_freq": [0] * 3 + [1] * 57, "n_shared_experts": 1, "num_attention_heads": 64,
        "num_experts_per_tok": 4, "num_hidden_layers": 60, "num_key_value_heads": 4, "num_local_experts": 128,
        "num_mtp_modules": 7, "num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5, "rope_theta": 5000000,
        "rotary_dim": 64, "routed_scaling_factor": 2.0, "scoring_func": "sigmoid", "shared_intermediate_size": 3072,
        "sparse_attention_config": {
            "sparse_attention_freq": [0] * 3 + [1] * 57, "sparse_block_size": 128, "sparse_index_dim": 128,
            "sparse_num_index_heads": 4, "sparse_topk_blocks": 16, "use_sparse_attention": True,
        },
        "tie_word_embeddings": False, "use_routing_bias": True, "vocab_size": 200064,
    }),
    "qwen3-30b-a3b": Published("48: 0-47", 128, 8, 30.53, 48 * 128 * 3 * 2048 * 768, QWEN3),
    "qwen3-30b-a3b-fp8": Published("48: 0-47", 128, 8, 30.53, 48 * 128 * 3 * 2048 * 768, {
        **QWEN3, "quantization_config": {**FP8, "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]},
    }),
    "qwen3-coder-480b-a35b": Published("62: 0-61", 160, 8, 480.15, 62 * 160 * 3 * 6144 * 2560, {
        **QWEN3, "hidden_size": 6144, "intermediate_size": 8192, "moe_intermediate_size": 2560,
        "num_hidden_layers": 62,
        "num_attention_heads": 96, "num_key_value_heads": 8, "num_experts": 160, "max_position_embeddings": 262144,
        "shared_expert_intermediate_size": 0, "use_qk_norm": True, "rope_theta": 10000000,
    }),
    "qwen3-vl-30b-a3b": Published("48: 0-47", 128, 8, 31.07, 48 * 128 * 3 * 2048 * 768, {
        "model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "image_token_id": 151655, "video_token_id": 151656, "tie_word_embeddings": False,
        "text_config": {**QWEN3, "model_type": "qwen3_vl_moe_text", "architectures": None},
    }),
    "qwen3.5-35b-a3b": Published("40: 0-39", 256, 8, 35.1, 40 * 256 * 3 * 2048 * 512, {
        "model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"], "text_config": QWEN35,
        "image_token_id": 248056, "video_token_id": 248057, "tie_word_embeddings": False,
    }),
    "qwen3.6-35b-a3b-nvfp4": Published("40: 0-39", 256, 8, 35.1, 40 * 256 * 3 * 2048 * 512, {
        "model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": {**QWEN35, "bos_token_id": 248044}, "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "ignore": ["mtp*"],
            "quantized_layers": {"lm_head": {"quant_algo": "W4A16_NVFP4", "group_size": 16}},
        },
    }),
    "deepseek-v3.2": Published("58: 3-60", 256, 8, 671.9, 58 * 256 * 3 * 7168 * 2048, {
        **DEEPSEEK, "model_type": "deepseek_v32", "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048,
        "bos_token_id": 0, "eos_token_id": 1, "vocab_size": 129280,
        "quantization_config": {**FP8, "scale_fmt": "ue8m0"},
        "rope_scaling": {**YARN, "factor": 40, "original_max_position_embeddings": 4096},
    }),
    # the first three layers select by a table of tokens: nothing to replay there
    "deepseek-v4-flash": Published("40: 3-42", 256, 6, 284.3, 43 * 256 * 3 * 4096 * 2048, {
        "model_type": "deepseek_v4", "expert_dtype": "fp4", "hc_mult": 4, "hc_sinkhorn_iters": 20, "head_dim": 512,
        "hidden_size": 4096, "index_head_dim": 128, "index_n_heads": 64, "index_topk": 512,
        "max_position_embeddings": 1048576, "moe_intermediate_size": 2048, "n_routed_experts": 256,
        "n_shared_experts": 1, "num_attention_heads": 64, "num_experts_per_tok": 6, "num_hidden_layers": 43,
        "num_hash_layers": 3, "num_key_value_heads": 1, "num_nextn_predict_layers": 1, "o_groups": 8,
        "o_lora_rank": 1024, "q_lora_rank": 1024, "qk_rope_head_dim": 64, "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus", "sliding_window": 128, "tie_word_embeddings": False, "vocab_size": 129280,
        "rope_scaling": {
            "type": "yarn", "beta_fast": 32, "beta_slow": 1, "factor": 16, "original_max_position_embeddings": 65536,
        },
        "rope_theta": 10000, "compress_rope_theta": 160000, "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
        "bos_token_id": 0, "eos_token_id": 1, "quantization_config": {**FP8, "scale_fmt": "ue8m0"},
    }),
    "gemma-4-26b-a4b": Published("30: 0-29", 128, 8, 25.2, 30 * 128 * 3 * 2816 * 704, {
        "model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"], "image_token_id": 258880,
        "tie_word_embeddings": True, "text_config": {
            "model_type": "gemma4_text", "attention_k_eq_v": True, "bos_token_id": 2, "eos_token_id": 1,
            "pad_token_id": 0, "enable_moe_block": True, "global_head_dim": 512, "head_dim": 256, "hidden_size": 2816,
            "hidden_size_per_layer_input": 0, "intermediate_size": 2112, "moe_intermediate_size": 704,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5, "num_attention_heads": 16,
            "num_experts": 128, "num_global_key_value_heads": 2, "num_hidden_layers": 30, "num_key_value_heads": 8,
            "num_kv_shared_layers": 0, "sliding_window": 1024, "top_k_experts": 8, "vocab_size": 262144,
            "vocab_size_per_layer_input": 262144, "tie_word_embeddings": True,
        },
    }),
    "granite-hybrid-small": Published("8: 0-7", 8, 2, 0.1446, 8 * 8 * 3 * 512 * 1024, {
        "model_type": "granitemoehybrid", "architectures": ["GraniteMoeHybridForCausalLM"], "hidden_size": 512,
        "intermediate_size": 1024, "layer_types": (["mamba"] * 3 + ["attention"]) * 2, "mamba_chunk_size": 256,
        "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 128, "mamba_d_state": 128, "mamba_expand": 2,
        "mamba_n_groups": 1, "mamba_n_heads": 8, "num_attention_heads": 8, "num_experts_per_tok": 2,
        "num_hidden_layers": 8, "num_key_value_heads": 8, "num_local_experts": 8, "position_embedding_type": "nope",
        "embedding_multiplier": 12, "residual_multiplier": 0.22, "attention_multiplier": 0.015625,
        "logits_scaling": 2, "shared_intermediate_size": 512, "tie_word_embeddings": True, "vocab_size": 49152,
        "bos_token_id": 0, "eos_token_id": 0,
    }),
    "llama-4-scout-17b-16e": Published("48: 0-47", 16, 1, 108.6, 48 * 16 * 3 * 5120 * 8192, {
        "model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "text_config": {
            "model_type": "llama4_text", "attention_chunk_size": 8192, "head_dim": 128, "hidden_size": 5120,
            "interleave_moe_layer_step": 1, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
            "max_position_embeddings": 10485760, "num_attention_heads": 40, "num_experts_per_tok": 1,
            "num_hidden_layers": 48, "num_key_value_heads": 8, "num_local_experts": 16, "rope_theta": 500000.0,
            "use_qk_norm": True, "vocab_size": 202048,
        },
    }),
    "mixtral-8x7b": Published("32: 0-31", 8, 2, 46.7, 32 * 8 * 3 * 4096 * 14336, {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "vocab_size": 32000, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2,
    }),
    "kimi-k2.5": Published("60: 1-60", 384, 8, 1026.9, 60 * 384 * 3 * 7168 * 2048, {
        "model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"], "eos_token_id": 163585,
        "bos_token_id": 163584, "pad_token_id": 163839, "auto_map": {
            "AutoConfig": "configuration_kimi_k25.KimiK25Config",
            "AutoModelForCausalLM": "modeling_kimi_k25.KimiK25ForConditionalGeneration",
        },
        "text_config": {
            **DEEPSEEK, "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "n_group": 1,
            "topk_group": 1, "first_k_dense_replace": 1, "n_routed_experts": 384, "num_attention_heads": 64,
            "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "routed_scaling_factor": 2.827,
            "vocab_size": 163840, "bos_token_id": 163584, "eos_token_id": 163585, "pad_token_id": 163839,
            "max_position_embeddings": 262144, "rope_theta": 50000.0,
            "rope_scaling": {**YARN, "factor": 64.0, "original_max_position_embeddings": 4096},
            "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
            "quantization_config": {
                "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
                "ignore": ["lm_head"], "config_groups": {
                    "group_0": {
                        "targets": ["Linear"], "input_activations": None,
                        "weights": {
                            "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True,
                        },
                    },
                },
            },
        },
    }),
    "nemotron-3-nano-30b-a3b": Published(
        "23: 1, 3, 6, 8, 10, 13, 15, 17, 20, 22, 24, 27, 29, 31, 34, 36, 38, 40, 43, 45, 47, 49, 51", 128, 6, 31.6,
        23 * 128 * 2 * 2688 * 1856, {
            "model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], "chunk_size": 128, "conv_kernel": 4,
            "expand": 2, "head_dim": 128, "hidden_size": 2688, "intermediate_size": 1856, "mamba_head_dim": 64,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "mamba_num_heads": 64,
            "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712, "n_group": 1, "n_groups": 8,
            "n_routed_experts": 128, "n_shared_experts": 1, "num_attention_heads": 32, "num_experts_per_tok": 6,
            "num_hidden_layers": 52, "num_key_value_heads": 2, "routed_scaling_factor": 2.5, "ssm_state_size": 128,
            "topk_group": 1, "use_mamba_kernels": True, "vocab_size": 131072, "tie_word_embeddings": False,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "auto_map": {
                "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
                "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
            },
        },
    ),
    "gpt-oss-20b": Published("24: 0-23", 32, 4, 20.9, 24 * 32 * (3 * 2880 * 2880 + 3 * 2880), {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "attention_bias": True, "head_dim": 64,
        "hidden_size": 2880, "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
        "num_attention_heads": 64, "num_experts_per_tok": 4, "experts_per_token": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 8, "num_local_experts": 32, "sliding_window": 128, "tie_word_embeddings": False,
        "vocab_size": 201088, "eos_token_id": 200002, "pad_token_id": 199999, "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    }),
    "glm-5": Published("75: 3-77", 256, 8, 744.0, 75 * 256 * 3 * 6144 * 2048, {
        **DEEPSEEK, "model_type": "glm_moe_dsa", "architectures": ["GlmMoeDsaForCausalLM"], "hidden_size": 6144,
        "intermediate_size": 12288, "head_dim": 64, "index_head_dim": 128, "index_n_heads": 32, "index_topk": 2048,
        "indexer_rope_interleave": True, "n_group": 1, "topk_group": 1, "num_attention_heads": 64,
        "num_hidden_layers": 78, "num_key_value_heads": 64, "q_lora_rank": 2048, "qk_head_dim": 256,
        "qk_nope_head_dim": 192, "v_head_dim": 256, "max_position_embeddings": 202752, "vocab_size": 154880,
        "rope_interleave": True, "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "eos_token_id": [154820, 154827, 154829], "pad_token_id": 154820,
    }),
}  # fmt: skip
