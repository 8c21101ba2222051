"""GRPO with Rollout Routing Replay on Mixtral, with LoRA on attention, the experts and the router.

The dataset has a column `prompt` and a column `answer`. To run it:

accelerate launch examples/grpo_mixtral.py \
    --model_name_or_path mistralai/Mixtral-8x7B-Instruct-v0.1 \
    --dataset_name path/or/hub-id \
    --output_dir mixtral-r3 \
    --use_routing_replay true \
    --routing_replay_compare_every 50 \
    --dtype bfloat16 \
    --use_peft --lora_r 16 --lora_alpha 32 --lora_dropout 0 \
    --lora_target_modules q_proj k_proj v_proj o_proj \
    --lora_target_parameters mlp.experts.gate_up_proj mlp.experts.down_proj mlp.gate.weight \
    --per_device_train_batch_size 8 \
    --num_generations 8 \
    --max_completion_length 512 \
    --learning_rate 1e-5

Experts and router are parameters, not linear layers: `--lora_target_parameters` names them, and PEFT has no dropout
for them. Without `--use_peft` all weights are trained. `--model_name_or_path` and `--dataset_name` also take local
folders, the latter one with JSON or Parquet files.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_r3 import R3GRPOConfig, R3GRPOTrainer


def answer_reward(completions, answer, **kwargs):
    """1 where a completion ends with the answer, else 0."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(text.rstrip(" .\n").endswith(str(right))) for text, right in zip(texts, answer, strict=True)]


def main(script_args, training_args, model_args):
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    training_args.model_init_kwargs = {
        "dtype": model_args.dtype,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = R3GRPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        reward_funcs=answer_reward,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, R3GRPOConfig, ModelConfig)).parse_args_and_config())
