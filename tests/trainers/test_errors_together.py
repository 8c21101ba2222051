"""One process that raises ends the run on all of them, with the same text: none waits for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trl_r3

SCRIPT = """
import os
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_r3 import R3GRPOConfig, R3GRPOTrainer

kind, folder = sys.argv[1:]
torch.manual_seed(0)
model = Qwen3MoeForCausalLM(
    Qwen3MoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=128, initializer_range=0.2, eos_token_id=1, pad_token_id=0,
    )
)
vocab = {"<pad>": 0, "<eos>": 1, **{chr(31 + i): i for i in range(2, 96)}}
tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="!"))
tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")


def play(prompts, trainer):
    prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    turn, logprobs = trainer.rollout_turn(prompt_ids)
    records = list(turn.records)
    if trainer.accelerator.process_index == 1:
        if kind == "missing":
            records[0] = torch.full_like(records[0], 255)
        elif kind == "wrong":
            records = [record.roll(1, 1) for record in records]
        elif kind == "short":
            records[0] = records[0][:-3]
    return {"prompt_ids": prompt_ids, "completion_ids": turn.completion_ids, "logprobs": logprobs,
            "routed_experts": records}


trainer = R3GRPOTrainer(
    model=model,
    args=R3GRPOConfig(
        folder, use_cpu=True, bf16=False, per_device_train_batch_size=8, num_generations=4, max_completion_length=48,
        max_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_routing_replay=True, ddp_timeout=60,
        generation_kwargs={"suppress_tokens": [0, 1]},
    ),
    reward_funcs=lambda completions, **kwargs: [float(len(set(text))) for text in completions],
    train_dataset=Dataset.from_dict({"prompt": ["1+2=3abc", "abcdefgh", "xyz(a,b)", "hello yo"] * 4}),
    processing_class=PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="!", padding_side="left"
    ),
    rollout_func=play,
)
try:
    trainer.train()
except Exception as error:
    rank = trainer.accelerator.process_index
    with open(f"{folder}/rank{rank}", "w") as file:
        file.write(f"{type(error).__name__}: {error}".replace(chr(10), " "))
    torch.distributed.barrier()
    os._exit(1)  # exit handlers aborted in 1 run of 55: PyTorch 2.13 leaves threads to them
"""
TEXTS = {
    "missing": "RuntimeError: process 1: .*rows have no record, the first in sample 0",
    "wrong": "MisalignedRecordError: process 1: the record of the rollout is not that of its tokens: layer 0",
    "short": "ValueError: process 1: sample 0: the record has",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_an_error_on_one_process_is_one_on_all(tmp_path, kind):
    (tmp_path / "run.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(trl_r3.__file__).parents[1])}
    done = subprocess.run(
        [*launch, str(tmp_path / "run.py"), kind, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    told = [tmp_path / f"rank{rank}" for rank in range(2)]
    assert all(path.exists() for path in told), done.stdout[-3000:] + done.stderr[-3000:]
    first, second = (path.read_text() for path in told)
    assert first == second
    assert re.match(TEXTS[kind], first), first
