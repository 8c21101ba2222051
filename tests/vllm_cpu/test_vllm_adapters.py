"""GRPO with replay and an adapter on a real server: it samples from the policy, base and adapter, that is trained."""

from __future__ import annotations

import copy
from typing import Any

import cpu_engine
import pytest
import torch
from engines.watch import assert_nothing_missing
from peft import LoraConfig
from vllm_training import assert_rows_are_those_of_a_forward, make

pytestmark = pytest.mark.vllm

ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
}
PROMPT = list(range(30, 50))


def merged(trainer):
    return copy.deepcopy(trainer.model).merge_and_unload().eval()


def distances(trainer, *scorers) -> list[list[float]]:
    """Of what the server samples with the weights that it has, from each scorer."""
    answer = trainer.vllm_generation.vllm_client.generate([PROMPT], n=4, max_tokens=20)
    logprobs = [[step[0] for step in steps] for steps in answer["logprobs"]]
    pairs = list(zip(answer["completion_ids"], logprobs, strict=True))
    return [[cpu_engine.distance(scorer, PROMPT, *pair) for pair in pairs] for scorer in scorers]


@pytest.mark.parametrize("what", ADAPTERS)
def test_a_server_samples_from_the_adapter(tmp_path, model, model_folder, server_on_cpu, what):
    from trl.generation.vllm_generation import VLLMGeneration

    trainer = make(
        tmp_path,
        model_folder,
        peft_config=LoraConfig(r=4, init_lora_weights=False, **ADAPTERS[what]),
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=server_on_cpu,
        vllm_group_port=cpu_engine.free_port(),
    )
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:  # experts get zeros whatever is set
            torch.nn.init.normal_(parameter, std=0.1)
    trainer.train()
    assert all(log["sampling/sampling_logp_difference/max"] < 1e-4 for log in trainer.state.log_history[:2])
    assert_nothing_missing(trainer, steps=2)
    assert_rows_are_those_of_a_forward(trainer)

    trainer.vllm_generation.sync_weights()
    policy = merged(trainer)
    from_policy, from_base = distances(trainer, policy, model)
    assert max(from_policy) < 1e-4 and min(from_base) > 1e-2
    VLLMGeneration.sync_weights(trainer.vllm_generation)  # TRL alone: the base again when it is packed
    from_policy, from_base = distances(trainer, policy, model)
    assert max(from_base) < 1e-4 and min(from_policy) > 1e-2
