"""One of several training processes that share a server: `torchrun two_processes.py URL FOLDER`. Run by a test."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets import Dataset
from engines.fake_vllm import routes_of
from engines.tiny_chat import make_trainer
from engines.watch import assert_nothing_missing, wrong_rows
from trl.generation import vllm_client, vllm_generation

from trl_r3.trainers import construction


def one_goes_on(prompts, trainer):
    """Two turns: the second one of 2 conversations on the first process, and of 1 on the other."""
    prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    first, logprobs = trainer.rollout_turn(prompt_ids)
    longer = [[*p, *c, 90] for p, c in zip(prompt_ids, first.completion_ids, strict=True)]
    trainer.rollout_turn(longer[: 2 - trainer.accelerator.process_index])
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": first.completion_ids,
        "logprobs": logprobs,
        "routed_experts": first.records,
    }


def main(url: str, folder: Path) -> None:
    torch.set_num_threads(1)
    for module in (vllm_client, vllm_generation, construction):
        module.is_vllm_available = lambda *args, **kwargs: True
    for name in ("init_communicator", "close_communicator", "update_named_params"):
        setattr(vllm_client.VLLMClient, name, lambda *args, **kwargs: None)
    prompts = Dataset.from_dict({"prompt": [f"t{30 + i}" + f" t{50 + i}" * (i % 3) for i in range(8)]})
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url}
    trainer = make_trainer(folder, prompts, ddp_backend="gloo", **server)
    trainer.train()
    samples = [sample for one in trainer.updates for sample in one.samples()]
    expected = [torch.from_numpy(routes_of(list(tokens))[:, [0, 2, 3]].astype("int64")) for tokens, _ in samples]
    rank = trainer.accelerator.process_index
    uneven = make_trainer(folder, prompts, ddp_backend="gloo", rollout_func=one_goes_on, **server)
    try:
        uneven.train()
        error = None
    except ValueError as refusal:
        error = str(refusal)
    if rank == 0:
        assert_nothing_missing(trainer, steps=2)
    report = {
        "processes": trainer.accelerator.num_processes,
        "samples": len(samples),
        "wrong": sum(wrong_rows(rows, own) for (_, rows), own in zip(samples, expected, strict=True)),
        "pairs": sum(rows[..., 0].numel() for _, rows in samples),
        "tokens": [list(tokens) for tokens, _ in samples],
        "uneven": error,
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # exit handlers aborted in 1 run of 55: PyTorch 2.13 leaves threads to them


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
