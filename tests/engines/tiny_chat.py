"""A tokenizer of whole words with a chat template that calls tools, tiny models, and trainers on them.

A tool call is one word, such as `<look>`, so that a model can be made to emit one by the bias of a single token.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from engines.watch import Watched
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_r3 import R3GRPOConfig, R3GRPOTrainer

VOCAB_SIZE = 128
PAD, EOS, UNK = 0, 1, 2
TOOLS = ["<look>", "<again>", "<deep>", "<big>"]
_ROLES = ["<user>", "<assistant>", "<tool>", "<system>"]
_WORDS = ["stop", "once", "twice", "cut", "full", "back", "sun", "moon", "wait", "down"]
_NAMED = ["<pad>", "<eos>", "<unk>", *_ROLES, *TOOLS, *_WORDS]
VOCAB = {word: i for i, word in enumerate(_NAMED)} | {f"t{i}": i for i in range(len(_NAMED), VOCAB_SIZE)}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<{{ message['role'] }}> {{ message['content'] }} {% for call in message['tool_calls'] or [] -%}
<{{ call['function']['name'] }}> {{ call['function']['arguments'] }} {% endfor -%}
<eos> {% endfor -%}
{%- if add_generation_prompt -%}<assistant> {% endif -%}"""

RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<(?P<name>look|again|deep|big)>",
            "close_pattern": r"\s+|$",
            "repeats": True,
            "content": "kv-lines",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"<eos>\s*", "content": "text"},
    },
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = copy.deepcopy(RESPONSE_TEMPLATE)
    return tokenizer


def tiny_qwen3_moe(seed: int = 0, **settings: Any) -> PreTrainedModel:
    """4 layers, the second one dense; 4 of 16 experts."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "mlp_only_layers": [1],
        "max_position_embeddings": 128,
        "initializer_range": 0.2,  # the default gives nearly uniform routers, where rounding decides
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **settings}))


def conversations(contents: list[str]) -> Dataset:
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": content}] for content in contents]})


def by_position(completions, **kwargs) -> list[float]:
    """A reward that differs within each group, whatever was said."""
    return [float(i % 3) for i in range(len(completions))]


class WatchedGRPO(Watched, R3GRPOTrainer):
    pass


def make_trainer(
    folder: Path,
    dataset: Dataset,
    model: PreTrainedModel | None = None,
    trainer_class: type = WatchedGRPO,
    config_class: type = R3GRPOConfig,
    **settings: Any,
) -> Any:
    """A trainer with replay on a CPU; what it does not know as a setting of its config goes to the trainer."""
    known = {name: settings.pop(name) for name in list(settings) if name in config_class.__dataclass_fields__}
    defaults: dict[str, Any] = {
        "use_routing_replay": True,
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 12,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return trainer_class(
        model=model if model is not None else tiny_qwen3_moe(),
        args=config_class(str(folder), **{**defaults, **known}),
        reward_funcs=settings.pop("reward_funcs", by_position),
        train_dataset=dataset,
        processing_class=settings.pop("processing_class", None) or make_tokenizer(),
        **settings,
    )
