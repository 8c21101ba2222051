"""GRPO with Rollout Routing Replay on Qwen3-MoE.

The dataset has a column `prompt` and, for the reward of this file, a column `answer`. Full fine-tuning:

accelerate launch examples/grpo_qwen3_moe.py \
    --model_name_or_path Qwen/Qwen3-30B-A3B \
    --dataset_name path/or/hub-id \
    --output_dir qwen3-r3 \
    --use_routing_replay true \
    --routing_replay_compare_every 50 \
    --dtype bfloat16 \
    --per_device_train_batch_size 8 \
    --num_generations 8 \
    --max_completion_length 1024 \
    --learning_rate 1e-6

LoRA on attention, with a larger learning rate, instead:

    --use_peft --lora_r 32 --lora_target_modules q_proj k_proj v_proj o_proj --learning_rate 1e-5

`--model_name_or_path` and `--dataset_name` also take local folders, the latter one with JSON or Parquet files.
"""

import re

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_r3 import R3GRPOConfig, R3GRPOTrainer

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def answer_reward(completions, answer, **kwargs):
    """1 where the last number of a completion is the answer, else 0."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    numbers = [NUMBER.findall(text.replace(",", "")) for text in texts]
    return [float(bool(found) and found[-1] == str(right)) for found, right in zip(numbers, answer, strict=True)]


def brevity_reward(completions, **kwargs):
    """For a dataset without answers: the shorter, the better."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [-len(text) / 1000 for text in texts]


def main(script_args, training_args, model_args):
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    train = dataset[script_args.dataset_train_split]
    training_args.model_init_kwargs = {
        "dtype": model_args.dtype,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = R3GRPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        reward_funcs=answer_reward if "answer" in train.column_names else brevity_reward,
        train_dataset=train,
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, R3GRPOConfig, ModelConfig)).parse_args_and_config())
