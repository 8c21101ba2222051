"""
Train the agent of `train.py` asynchronously: episodes are rolled out while the policy trains, and are some versions
old when it learns from them. Each row goes through the experts of the server, whatever its age.

    pip install aiohttp requests
    python examples/agent/train_async.py

The server is part of this process (`server.py`), and its weights are copied from the trainer's. On GPUs, `vllm serve
--enable-return-routed-experts` takes its place, TRL sends weights by NCCL, and nothing of `without_gpu` is needed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from server import Sampler, serve
from task import FixTheFile, learn_the_tools, make_model, make_tokenizer, problems
from transformers import PrinterCallback
from trl.experimental.async_grpo import async_grpo_trainer, async_rollout_worker, packing

from trl_r3 import R3AsyncGRPOConfig, R3AsyncGRPOTrainer


def attend(q, k, v, starts_q, starts_k, longest_q, longest_k, *, softmax_scale, **kwargs) -> torch.Tensor:
    """What FA3 computes of a packed row, segment by segment: (tokens, heads, head size), causal from the end."""
    outputs = []
    for i in range(len(starts_q) - 1):
        queries = q[starts_q[i] : starts_q[i + 1]].transpose(0, 1)[None]
        keys, values = (x[starts_k[i] : starts_k[i + 1]].transpose(0, 1)[None] for x in (k, v))
        seen = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool)
        seen = seen.tril(keys.shape[2] - queries.shape[2])
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=seen, scale=softmax_scale, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def without_gpu() -> None:
    """Let TRL's AsyncGRPO run on a CPU without vLLM: it asks for FA3, for that package and for the name of a GPU."""
    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=attend)
    async_rollout_worker.is_vllm_available = lambda *args, **kwargs: True
    async_grpo_trainer.get_peak_flops_per_device = lambda *args, **kwargs: None


def train(folder: Path, tokenizer: Any, options: Any) -> R3AsyncGRPOTrainer:
    """Train the model of a folder, with a server that begins as it does."""
    model = make_model(options.seed).from_pretrained(folder)
    sampler = Sampler(model)
    with serve(sampler) as url:
        trainer = R3AsyncGRPOTrainer(
            model=str(folder),
            args=R3AsyncGRPOConfig(
                tempfile.mkdtemp(),
                use_routing_replay=True,
                use_cpu=True,
                bf16=False,
                vllm_server_base_url=url,
                max_steps=options.steps,
                learning_rate=options.learning_rate,
                per_device_train_batch_size=options.batch,
                token_budget=0,
                num_generations=8,
                max_completion_length=24,
                max_tool_calling_iterations=6,
                max_staleness=options.staleness,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=options.seed,
            ),
            train_dataset=Dataset.from_list(problems()),
            processing_class=tokenizer,
            environment_factory=FixTheFile,
            weight_transfer=sampler,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Learn the tools, train, and return what was logged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--staleness", type=int, default=2, help="versions of the weights that an episode may be old")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--tool_steps", type=int, default=150, help="supervised steps before")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # faster for matrices so small
    without_gpu()
    model, tokenizer = make_model(options.seed), make_tokenizer()
    learn_the_tools(model, tokenizer, options.tool_steps, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        trainer = train(Path(folder), tokenizer, options)
    log = [entry for entry in trainer.state.log_history if "routing_replay/replayed_frac" in entry]
    print("step  reward  replayed  staleness  live routing would differ (routers)")
    for step, entry in enumerate(log, 1):
        shares = [entry[f"routing_replay/{name}"] for name in ("replayed_frac", "staleness", "changed_router_frac")]
        print(f"{step:4d}  {entry['reward']:6.2f}  {shares[0]:8.2f}  {shares[1]:9.2f}  {shares[2]:.3f}")
    return log


if __name__ == "__main__":
    main()
