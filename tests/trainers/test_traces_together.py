"""Two processes write a trace each, and one that cannot write holds up nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import trl_r3
from trl_r3 import load_trace
from trl_r3.traces.trace_file import find_traces
from trl_r3.traces.trace_replay import verify_trace

SCRIPT = """
import json
import os
import sys
import warnings

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_r3 import R3GRPOConfig, R3GRPOTrainer

folder, = sys.argv[1:]
torch.manual_seed(0)
model = Qwen3MoeForCausalLM(
    Qwen3MoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=128, initializer_range=0.2, eos_token_id=1, pad_token_id=0,
    )
)
if int(os.environ["RANK"]) == 0:
    model.save_pretrained(f"{folder}/model")
vocab = {"<pad>": 0, "<eos>": 1, **{chr(31 + i): i for i in range(2, 96)}}
tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="!"))
tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
trainer = R3GRPOTrainer(
    model=model,
    args=R3GRPOConfig(
        folder, use_cpu=True, bf16=False, per_device_train_batch_size=4, num_generations=2, max_completion_length=8,
        max_steps=3, save_strategy="no", report_to=[], disable_tqdm=True, use_routing_replay=True, ddp_timeout=60,
        routing_replay_trace_dir=f"{folder}/traces", learning_rate=1e-2,
    ),
    reward_funcs=lambda completions, **kwargs: [float(len(set(text))) for text in completions],
    train_dataset=Dataset.from_dict({"prompt": ["1+2=", "abcdefgh", "x", "hello"] * 4}),
    processing_class=PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="!", padding_side="left"
    ),
)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    trainer.train()
told = [str(each.message) for each in caught if "tracing" in str(each.message)]
with open(f"{folder}/rank{trainer.accelerator.process_index}", "w") as file:
    json.dump([trainer.state.global_step, told], file)
trainer.accelerator.wait_for_everyone()
os._exit(0)  # exit handlers aborted in 1 run of 55: PyTorch 2.13 leaves threads to them
"""


def test_each_process_writes_its_own(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    traces = tmp_path / "traces"
    traces.mkdir()
    # on the second process the disk is full from step 1 on
    (traces / "step-00000001-rank-00001.part").symlink_to("/dev/full")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(trl_r3.__file__).parents[1])}
    done = subprocess.run(
        [*launch, str(tmp_path / "run.py"), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (steps, told), (other_steps, other_told) = (
        json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2)
    )
    assert (steps, other_steps) == (3, 3) and told == []
    assert len(other_told) == 1 and other_told[0].startswith("tracing ends at step 1, the run goes on")
    first, *_ = loaded = [load_trace(path) for path in find_traces(traces)]
    assert [(each.facts.step, each.facts.rank) for each in loaded] == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert {each.facts.num_ranks for each in loaded} == {2}
    assert not torch.equal(first.tokens, loaded[1].tokens), "each process has prompts of its own"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")  # of step 0
    assert [verify_trace(model, each).matches for each in loaded] == [True, True, False, False]
    assert sorted(traces.iterdir()) == find_traces(traces), "nothing half written is left"
