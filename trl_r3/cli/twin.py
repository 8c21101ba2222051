"""A narrow twin of a model: its config with every width small, the layers, experts and top-k as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .._compat import is_causal_lm
from .bad_input import BadInput, first_line

HIDDEN_SIZE, VOCABULARY = 64, 256

# By attribute name; a config takes those that it has. Sizes of heads and rotary sections stay: they fit each other.
_WIDTHS: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model"), HIDDEN_SIZE),
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "dense_intermediate_size", "ffn_hidden_size"), 32),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "moe_hidden_size", "moe_latent_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "router_hidden_size"), 16),
    **{"linear_num_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    # Mamba's: heads times the size of a head is the hidden size, expanded, and groups divide the heads
    **dict.fromkeys(("mamba_expand", "expand"), 2),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 2 * HIDDEN_SIZE // 4),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_dt_rank"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),  # tokens that are padded to and computed at once
    "initializer_range": 0.1,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "hidden_size_per_layer_input": 0,
    "use_mamba_kernels": False,
    "dtype": None,
}
_HEADS = ("num_attention_heads", "n_heads", "swa_num_attention_heads")
_KEY_HEADS = ("num_key_value_heads", "swa_num_key_value_heads")
_HEADS_LEFT = 4

_TOWERS: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers"), 1),
    **dict.fromkeys(("out_hidden_size", "output_dim", "adapter_in_dim", "adapter_out_dim"), HIDDEN_SIZE),
    **dict.fromkeys(("adapter_input_size", "text_hidden_size"), HIDDEN_SIZE),
    "deepstack_visual_indexes": [0],
}


def narrow_twin(config: Any, name: str, trust_remote_code: bool = False) -> Any:
    """
    Build a twin with random weights.

    Args:
        config (`transformers.PreTrainedConfig`):
            Of the model. Of one that also takes images, the twin is the model for text, where there is one alone, or
            has towers of one layer.
        name (`str`):
            What errors call it.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the config is run.

    Returns:
        `torch.nn.Module`: In evaluation mode, in float32.

    Raises:
        [`BadInput`]: If the config cannot be made narrow.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    text = config.get_text_config()
    is_alone = is_causal_lm(text)
    auto = AutoModelForCausalLM if is_alone else AutoModelForImageTextToText
    errors = []
    for heads in (_HEADS_LEFT, None):  # as they are, where other sizes depend on their number
        try:
            narrow = narrow_config(text, heads) if is_alone else _with_low_towers(config, heads)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = auto.from_config(narrow, dtype=torch.float32, trust_remote_code=trust_remote_code).eval()
            _score_a_token(model)
        except Exception as error:  # whatever a config may raise whose sizes do not fit each other
            errors.append(error)
        else:
            return model
    raise BadInput(
        f"{name} has no weights on this machine, and its config cannot be made narrow: {first_line(errors[0])}. Pass "
        "a folder with its weights."
    ) from errors[0]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let one thread compute: what a twin computes is too small for more, which wait for each other by spinning."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _with_low_towers(config: Any, heads: int | None) -> Any:
    """The config with a narrow text model, and every other part as low as it can be: no test feeds it."""
    text = config.get_text_config()
    if text is config:
        return narrow_config(config, heads)
    low = copy.deepcopy(config)
    for name in low.sub_configs:
        part = getattr(low, name, None)
        if part is low.get_text_config():
            setattr(low, name, narrow_config(part, heads))
        elif part is not None:
            for key, value in _TOWERS.items():
                if _has(part, key):
                    setattr(part, key, value)
    return low


def narrow_config(config: Any, heads: int | None) -> Any:
    """The config with small widths, and with so many attention heads, if given."""
    narrow = copy.deepcopy(config)
    values = {name: value for name, value in _WIDTHS.items() if _has(narrow, name)}
    if heads is not None:
        values |= {key: heads for key in _HEADS if _has(config, key)}
        values |= {key: _keys_for(config, key, heads) for key in _KEY_HEADS if _has(config, key)}
    for key, value in values.items():
        old = getattr(narrow, key)
        # a list of widths has one for each layer; a list of tokens is a choice of them, for which one serves
        by_layer = isinstance(old, (list, tuple)) and not key.endswith("_token_id")
        setattr(narrow, key, [value] * len(old) if by_layer else value)
    return narrow


def _has(config: Any, name: str) -> bool:
    return getattr(config, name, None) is not None


def _keys_for(config: Any, name: str, heads: int) -> int:
    """As many heads of keys as the ratio asks for, at least one."""
    queries = getattr(config, name.replace("key_value", "attention"), None) or getattr(config, "n_heads", heads)
    queries = max(queries) if isinstance(queries, (list, tuple)) else queries
    keys = getattr(config, name)
    keys = max(keys) if isinstance(keys, (list, tuple)) else keys
    return max(1, heads * keys // queries)


@torch.no_grad()
def _score_a_token(model: Any) -> None:
    model(input_ids=torch.arange(1, 9)[None], use_cache=False)
