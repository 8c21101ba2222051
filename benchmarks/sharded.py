"""
Step time with replay over step time without, on two processes that shard the model.

    python benchmarks/sharded.py fsdp2 zero3

Runs with and without replay take turns, each launched by `accelerate launch` with a config of `examples/accelerate`.
The rollout is told by arithmetic, so that a step is loss, backward and optimizer. Needs no GPU; ZeRO needs DeepSpeed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROMPT, COMPLETION, BATCH, WARM_UP = 32, 96, 4, 3
# The head stays below the 100,000 elements that ZeRO-3 partitions: without a GPU TRL 1.16 fails on a partitioned one.
SIZES = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128,
    "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 32,
    "num_experts_per_tok": 4,
}  # fmt: skip


def train(folder: Path, steps: int, use_replay: bool) -> None:
    """Train so many steps on this process and write how long each took."""
    import torch
    from accelerate import DistributedType, PartialState
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from trl_r3 import R3GRPOConfig, R3GRPOTrainer

    torch.set_num_threads(1)

    class Trainer(R3GRPOTrainer):
        def create_accelerator_and_postprocess(self):
            state = PartialState()
            if os.environ.get("ACCELERATE_USE_FSDP") == "true":
                state.distributed_type = DistributedType.MULTI_GPU  # else Accelerate reads no settings of FSDP
            super().create_accelerator_and_postprocess()

    def play(prompts, trainer):
        shape = (COMPLETION + PROMPT - 1, SIZES["num_hidden_layers"], SIZES["num_experts"])
        routes = [
            torch.rand(shape, generator=torch.Generator().manual_seed(i)).argsort(-1)[..., :4]
            for i in range(len(prompts))
        ]
        return {
            "prompt_ids": [[5 + i % 9 for i in range(PROMPT)] for _ in prompts],
            "completion_ids": [[20 + (7 * i + j) % 200 for i in range(COMPLETION)] for j in range(len(prompts))],
            "logprobs": [[-1.0] * COMPLETION for _ in prompts],
            "routed_experts": routes,
        }

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="a"))
    trainer = Trainer(
        model=str(folder / "model"),
        args=R3GRPOConfig(
            str(folder / "out"), use_cpu=True, bf16=False, use_routing_replay=use_replay, routing_replay_alarm="off",
            per_device_train_batch_size=BATCH, steps_per_generation=1, num_generations=2, max_steps=steps,
            max_completion_length=COMPLETION, logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True, gradient_checkpointing=False, router_aux_loss_coef=0.0,
            model_init_kwargs={"dtype": "float32"},
        ),
        reward_funcs=lambda prompts, **kwargs: [float(i % 2) for i in range(len(prompts))],
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 64}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
        rollout_func=play,
    )  # fmt: skip
    trainer.train()
    if trainer.accelerator.is_main_process:
        times = [log["step_time"] for log in trainer.state.log_history if "step_time" in log][WARM_UP:]
        (folder / "times.json").write_text(json.dumps(times))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def launch(config: str, folder: Path, steps: int, use_replay: bool) -> list[float]:
    """Seconds of each step of a run."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    command += ["--config_file", str(ROOT / "examples" / "accelerate" / f"{config}.yaml"), "--mixed_precision", "no"]
    command += ["--main_process_port", "0", __file__, "--folder", str(folder), "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, *["--replay"] * use_replay], env=environment, capture_output=True, text=True, cwd=folder
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads((folder / "times.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("configs", nargs="*", default=[], help="names in examples/accelerate, e.g. fsdp2 zero3")
    parser.add_argument("--pairs", type=int, default=4, help="runs without and with replay (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=15, help="of each run (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="one pair of the shortest runs: times mean nothing")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--replay", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        train(options.folder, options.steps, options.replay)
        return
    pairs, steps = (1, WARM_UP + 1) if options.smoke else (options.pairs, options.steps)
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)).save_pretrained(folder / "model")
        for config in options.configs:
            medians = []
            for pair in range(pairs):
                print(f"{config}: pair {pair + 1} of {pairs}", file=sys.stderr, flush=True)
                of_pair = [launch(config, folder, steps, replay) for replay in (False, True)]
                medians.append([statistics.median(times) for times in of_pair])
            ratios = [replayed / live for live, replayed in medians]
            live = statistics.median(live for live, _ in medians)
            print(
                f"{config}: {live:.3f} s a step without replay, with it {statistics.median(ratios):.3f} times that "
                f"({min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} pairs of runs)",
                flush=True,
            )


if __name__ == "__main__":
    main()
