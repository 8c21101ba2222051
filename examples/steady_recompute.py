"""Supervised fine-tuning whose gradient checkpoints recompute through the experts of their own forward: no rollout.

python examples/steady_recompute.py \
    --model_name_or_path Qwen/Qwen3-30B-A3B \
    --dtype bfloat16 \
    --dataset_name trl-lib/Capybara \
    --output_dir Qwen3-30B-A3B-SFT \
    --use_peft \
    --lora_target_modules q_proj k_proj v_proj o_proj

Any other trainer works alike: `enable_routing_replay` needs its model only, before `train()`.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from trl_r3 import enable_routing_replay

TYPES = (ScriptArguments, SFTConfig, ModelConfig)


def main(script_args, training_args, model_args):
    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        peft_config=get_peft_config(model_args),
    )
    print(enable_routing_replay(trainer.model, steady_recompute=True))
    trainer.train()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main(*TrlParser(TYPES).parse_args_and_config())
