"""Small random models of every mixture-of-experts causal LM of the installed Transformers.

MOE_MODEL_TYPES have a class for AutoModelForCausalLM, MULTIMODAL_MOE_MODEL_TYPES only one that also takes images or
audio; the latter run on text alone as well. build_tiny builds both kinds.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

# Mixtures of experts of either mapping that are no causal LM here, and why.
UNBUILDABLE: dict[str, str] = {"diffusion_gemma": "it denoises blocks of tokens: generate returns no plain sequence"}

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
    "index_n_heads": 16,
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

# In place of the above, for vision and audio towers: they only have to exist, no test feeds them.
TOWER_RULES: dict[str, Any] = RULES | {
    "num_hidden_layers": 1,
    "num_key_value_heads": 4,
    "depth": 1,
    "num_heads": 4,
    "embed_dim": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "image_size": 56,
    "window_size": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "downsample_hidden_size": 16,
    "downsample_channels": [16, 32],
    "output_channels": 16,
    "projection_hidden_dim": 32,
    # names for the hidden size of the text model
    "out_hidden_size": 32,
    "output_dim": 32,
    "adapter_in_dim": 32,
    "adapter_out_dim": 32,
    "adapter_input_size": 32,
    "text_hidden_size": 32,
}

LINEAR = ["linear_attention", "full_attention", "linear_attention"]
LINEAR_INDEXED = ["linear_attention", "indexed_attention", "linear_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# What the rules cannot know, by the model_type of the config that takes it.
OVERRIDES: dict[str, dict[str, Any]] = {
    # The default pattern has no full attention among three layers, and the cache needs one.
    "bailing_hybrid": {"layer_types": LINEAR},
    "kimi_linear": {"layer_types": LINEAR},
    "qwen3_5_moe_text": {"layer_types": LINEAR},
    "qwen3_next": {"layer_types": LINEAR},
    # Shared experts are off by default; the default scale flattens the logits of so small a model.
    "cohere2_moe": {"num_shared_experts": 1, "logit_scale": 1.0},
    # The experts are described in a config of their own; the attention reads two values that have no usable default.
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
    },
    # Groups are ignored by the default selection.
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "deepseek_ocr2_text": {"topk_method": "group_limited_greedy"},
    "unlimited_ocr_text": {"topk_method": "group_limited_greedy"},
    # Every kind of layer among three: two routers (by token id, by score) and two compressed attentions, the rates of
    # which must be below the length of a test's sequence.
    "deepseek_v4": {
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "num_key_value_heads": 1,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
    },
    # Dense by default; its keys are a product of two halves, so the number of experts is a square.
    "doge": {"is_moe": True, "num_experts": 16},
    # None by default, and the MoE block multiplies by it.
    "dots1": {"n_shared_experts": 1},
    # Layers with sliding attention take their sizes from keywords that are not attributes.
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
    # One width for text experts and one for vision experts; rotary sections that fit the head.
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]},
    },
    # Dense by default; the head size of full attention is no attribute; embeddings per layer are for dense models.
    "gemma4_text": {"enable_moe_block": True, "global_head_dim": 16, "hidden_size_per_layer_input": 0},
    # Rotary sections that fit the head.
    "glm4v_moe_text": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 0]}},
    # No rotary part is allowed, and index_topk must be a multiple of the pooling.
    "glm5_next_text": {"layer_types": LINEAR_INDEXED, "qk_rope_head_dim": 0, "index_kpool": 4},
    # Attention is off by default, and the Mamba heads must divide twice the hidden size.
    "granitemoehybrid": {"layer_types": LINEAR, "mamba_n_heads": 8, "mamba_d_head": 8},
    # Rotary sections that fit the head.
    "hy_v4_vl_text": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    # Two passes over the last two layers: its checkpoints loop, but by default nothing of so small a model would.
    "inkling2_loop_text": {
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
        "loop_gate_rank": 8,
    },
    # The default divides the logits of so small a model down to nothing.
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    # A patch with few prime factors, for which the layers are planned without scipy.
    "inkling_vision": {"num_hidden_layers": 4, "patch_size": 2},
    # Attention at the third of four layers; every other layer has experts.
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    # No default.
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    # A dense layer first; chunks shorter than a test's sequence.
    "llama4_text": {"moe_layers": [1, 2], "attention_chunk_size": 8},
    # Experts without weights, which some tokens choose.
    "longcat_flash": {"zero_expert_num": 4},
    # Sparse attention is off by default, and its heads must match those of the keys.
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "rotary_dim": 4,
    },
    # The sum of both parts of a head.
    "mistral4": {"head_dim": 16},
    # Sizes that must match the text model, or that come as lists; the default flattens the logits.
    "muse_spark": {"out_hidden_size": 32, "projector_hidden_size": 32},
    "muse_spark_audio": {"patch_sizes": [2], "hidden_sizes": [16], "depths": [1]},
    "muse_spark_text": {"moe_hidden_size": 16, "output_multiplier": 1.0},
    # A layer is one block here; the default pattern has one MoE block. Squared activations leave the experts little.
    "nemotron_h": {
        "layer_types": ["linear_attention", "mlp", "moe", "full_attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "moe_latent_size": 16,
        "routed_scaling_factor": 10.0,
    },
    # Read by the model, but no attribute of the config.
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 127},
    # The indexer is off unless all of its sizes are given.
    "qwen4_exp_text": {
        "layer_types": LINEAR_INDEXED,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    # No default, though the default layers need it.
    "step3p5": {"sliding_window": 8},
    # The family routes to one expert only.
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}

_ROUTER = re.compile(r"(^|\.)(gate|router|router_gate)\.")
_EXPERT_BIAS = re.compile(r"(^|\.)(expert_bias|e_score_correction_bias|experts\.\w*bias)$")
_CLASS = re.compile(r"^class (\w+)\(", re.MULTILINE)
_MOE_CLASS = re.compile(r"^class \w*(?:MoE|Moe|MOE|Experts)\w*\(", re.MULTILINE)


@cache
def _defined_in() -> dict[str, Path]:
    """The modeling file of each class, for model types that have none of their own."""
    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    return {name: path for path in files for name in _CLASS.findall(path.read_text(encoding="utf-8"))}


def _has_experts(model_type: str, class_name: str) -> bool:
    """Whether the modeling code of ``model_type`` defines experts, without importing it."""
    module = model_type_to_module_name(model_type)
    path = Path(transformers.__file__).parent / "models" / module / f"modeling_{module}.py"
    if not path.exists():  # Sarvam's two are DeepSeek-V3 and GLM-4
        path = _defined_in()[class_name]
    return _MOE_CLASS.search(path.read_text(encoding="utf-8")) is not None


MOE_MODEL_TYPES: tuple[str, ...] = tuple(
    t for t, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if t not in UNBUILDABLE and _has_experts(t, name)
)
MULTIMODAL_MOE_MODEL_TYPES: tuple[str, ...] = tuple(
    t
    for t, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
    if t not in MOE_MODEL_TYPES and t not in UNBUILDABLE and _has_experts(t, name)
)


def _small(config: PreTrainedConfig, rules: dict[str, Any] = RULES, **overrides: Any) -> dict[str, Any]:
    """Keywords that make a small config out of the defaults of ``config``; ``overrides`` are for its text config."""
    values = {name: value for name, value in rules.items() if name in vars(config)}
    if not getattr(config, "sliding_window", None):
        values.pop("sliding_window", None)  # a window that the layers do not have would still truncate the cache
    if "kv_lora_rank" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= OVERRIDES.get(config.model_type, {})
    text = config.get_text_config()
    if text is config:
        values |= overrides
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is text:
            values[name] = type(part)(**_small(part, **overrides))
        elif part is not None and part.model_type:
            values[name] = type(part)(**_small(part, TOWER_RULES))
    return values


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The small config of ``model_type``; ``overrides`` go to its text config."""
    cls = CONFIG_MAPPING[model_type]
    return cls(**_small(cls(), **overrides))


@torch.no_grad()
def _spread_routing(model: PreTrainedModel) -> None:
    """Random values for what Transformers leaves constant, so that the routing varies from token to token."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        leaf = name.rpartition(".")[2]
        scales = {"weight", "scale", "per_expert_scale", "router_states_scale"}
        routing = _ROUTER.search(name) is not None
        if leaf == "tid2eid":  # the experts of each token id
            experts = model.config.get_text_config().n_routed_experts
            tensor.copy_(torch.rand(tensor.shape[0], experts).topk(tensor.shape[1], dim=-1).indices)
        elif leaf == "balancing_biases":  # the last one is for skipping the experts, which some tokens should do
            tensor.zero_()
            tensor[-1] = 0.3
        elif routing and tensor.dim() == 1 and leaf in scales:
            tensor.mul_(1 + 0.2 * torch.randn_like(tensor))
        elif routing and leaf == "weight":
            tensor.normal_(std=0.5)
        elif (routing and leaf.endswith("bias")) or _EXPERT_BIAS.search(name):
            tensor.normal_(std=0.05)


def build_tiny(
    model_type: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    with_images: bool | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """
    A small random model of ``model_type`` in eval mode, the same one for the same seed. In another dtype Transformers
    may keep some parts in fp32. Where a type exists with and without a tower, it has none by default.
    """
    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with_images = model_type not in MOE_MODEL_TYPES if with_images is None else with_images
        auto = AutoModelForImageTextToText if with_images else AutoModelForCausalLM
        model = auto.from_config(config, dtype=dtype)
        _spread_routing(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()
