"""
Train one of the recipes of this folder, or run it narrow on a CPU to see that it runs.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/recipes/train.py \\
        --config examples/recipes/qwen3_30b_a3b_fsdp2.yaml
    python examples/recipes/train.py --config examples/recipes/qwen3_30b_a3b_fsdp2.yaml --dry_run

Each recipe is a file of settings with its launch line at the top. Options of the command line go before those of the
file. With `--dry_run` the model has two layers, a hidden size of 64, a vocabulary of 256, and the recipe's own kind of
layers, number of experts and top-k; its weights are random, tokenizer and data are made here, Transformers generates,
and two steps are trained. What a dry run leaves out is the accelerate config, vLLM, 4 bits and the real sizes.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
from trl.rewards import accuracy_reward

from trl_r3 import R3GRPOConfig, R3GRPOTrainer

HERE = Path(__file__).parent
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")

# What a dry run sets, whatever the recipe says.
DRY_RUN = {
    "use_cpu": "true",
    "bf16": "false",
    "dtype": "float32",
    "load_in_4bit": "false",
    "use_vllm": "false",
    "use_transformers_continuous_batching": "false",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_generations": 4,
    "max_completion_length": 8,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}

# Widths of its model. A config takes those it has.
NARROW = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "vocab_size": 256,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
NARROW_VISION = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 4,
    "num_position_embeddings": 16,
    "out_hidden_size": 64,
}


@dataclass
class RecipeArguments(ScriptArguments):
    """What a recipe says beside the settings of TRL."""

    model_config: str | None = field(
        default=None, metadata={"help": "Folder under `configs` with the sizes of the model, for `--dry_run`."}
    )
    text_only: bool = field(
        default=False, metadata={"help": "Whether a model that also takes images is trained on text."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Whether to run two steps of a narrow model on a CPU."})


def answer_reward(completions, answer, **kwargs):
    """1 where the last number of a completion is the answer, else 0."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    numbers = [NUMBER.findall(text.replace(",", "")) for text in texts]
    return [float(bool(found) and found[-1] == str(right)) for found, right in zip(numbers, answer, strict=True)]


def parse(argv: list[str]) -> tuple[RecipeArguments, R3GRPOConfig, ModelConfig]:
    """The settings of a recipe and of the command line, those of a dry run last."""
    recipe: dict[str, Any] = {}
    if "--config" in argv:
        path = Path(argv[argv.index("--config") + 1])
        if not path.is_file():
            sys.exit(f"{path} is missing. The recipes are {', '.join(sorted(p.name for p in HERE.glob('*.yaml')))}.")
        recipe = yaml.safe_load(path.read_text())
    if "--dry_run" in argv:
        # several updates of a rollout stay several
        updates = recipe.get("steps_per_generation", 1) // recipe.get("gradient_accumulation_steps", 1)
        settings = {**DRY_RUN, "steps_per_generation": min(max(updates, 1), 2), "output_dir": tempfile.mkdtemp()}
        argv = [*argv, *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]
    return TrlParser((RecipeArguments, R3GRPOConfig, ModelConfig)).parse_args_and_config(argv)


def narrow_config(folder: Path) -> Any:
    """The config in a folder, with two layers and small widths, and its experts and top-k as they are."""
    if not (folder / "config.json").is_file():
        sys.exit(f"{folder / 'config.json'} is missing. A dry run takes the number of experts and the top-k from it.")
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config(decoder=True)
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or []))  # one of each kind, in their order
    if kinds:
        text.layer_types = (kinds * 2)[:2]
    narrow(text, NARROW)
    if hasattr(config, "vision_config"):
        narrow(config.vision_config, NARROW_VISION)
    return config


def narrow(config: Any, widths: dict[str, Any]) -> None:
    """Set the widths that a config has."""
    for name, value in widths.items():
        if hasattr(config, name):
            setattr(config, name, value)


def characters() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, with 256 tokens."""
    vocab = ["<pad>", "<eos>", "<unk>", *(chr(code) for code in range(32, 127))]
    vocab += [f"<{index}>" for index in range(256 - len(vocab))]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocab)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def dry_model(config: Any) -> str:
    """A folder with a narrow model of random weights and its tokenizer."""
    folder = tempfile.mkdtemp()
    torch.manual_seed(0)
    multimodal = hasattr(config, "vision_config")
    auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    auto.from_config(copy.deepcopy(config)).save_pretrained(folder)
    characters().save_pretrained(folder)
    return folder


def dry_data() -> Dataset:
    """Sums."""
    sums = [(a, b) for a in range(4) for b in range(4)]
    return Dataset.from_dict({"prompt": [f"{a}+{b}=" for a, b in sums], "answer": [str(a + b) for a, b in sums]})


def main(argv: list[str] | None = None) -> R3GRPOTrainer:
    """Train, and return the trainer."""
    recipe, args, model = parse(list(sys.argv[1:] if argv is None else argv))
    if recipe.dry_run:
        if recipe.model_config is None:
            sys.exit("`model_config` is missing from the recipe. A dry run narrows the config that it names.")
        model.model_name_or_path = dry_model(narrow_config(HERE / "configs" / recipe.model_config))
        train = dry_data()
    else:
        train = load_dataset(recipe.dataset_name, name=recipe.dataset_config)[recipe.dataset_train_split]
    args.model_init_kwargs = {
        "dtype": model.dtype,
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        **(args.model_init_kwargs or {}),
    }
    trainer = R3GRPOTrainer(
        model=model.model_name_or_path,
        args=args,
        reward_funcs=answer_reward if "answer" in train.column_names else accuracy_reward,
        train_dataset=train,
        processing_class=AutoTokenizer.from_pretrained(model.model_name_or_path) if recipe.text_only else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if not recipe.dry_run:
        trainer.save_model(args.output_dir)
    return trainer


if __name__ == "__main__":
    main()
