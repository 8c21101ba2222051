"""TRL's own GRPO on engines of a CPU: what its own `sync_weights` brings, colocated and through its client."""

from __future__ import annotations

import copy

import cpu_engine
import pytest
from datasets import Dataset
from peft import LoraConfig

pytestmark = pytest.mark.vllm

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def count_distinct(completions, completion_ids, **kwargs) -> list[float]:
    return [float(len(set(ids))) for ids in completion_ids]


def train(model_folder, output: str, lora: bool, **vllm):
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output,
        use_cpu=True,
        bf16=False,
        use_vllm=True,
        **vllm,
        model_init_kwargs={"dtype": "float32"},
        learning_rate=1e-2,
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=16,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    prompts = Dataset.from_dict({"prompt": [f"t{i} t{i + 1} t{i + 2}" for i in range(10, 26)]})
    trainer = GRPOTrainer(
        str(model_folder),
        reward_funcs=count_distinct,
        args=args,
        train_dataset=prompts,
        peft_config=LORA if lora else None,
    )
    trainer.train()
    trainer.vllm_generation.sync_weights()
    return trainer


def policy_of(trainer):
    """What the trainer sends: of an adapter, the base with the adapter in it."""
    policy = copy.deepcopy(trainer.model).eval()
    return policy.merge_and_unload() if hasattr(policy, "merge_and_unload") else policy


@pytest.mark.parametrize("lora", [False, True])
def test_colocate(lora, model, model_folder, tmp_path, colocate_on_cpu):
    from vllm import SamplingParams

    trainer = train(model_folder, str(tmp_path), lora, vllm_mode="colocate", vllm_max_model_length=256)
    llm = trainer.vllm_generation.llm
    try:
        prompt = list(range(30, 50))
        sampling = SamplingParams(n=4, max_tokens=20, logprobs=0)
        [output] = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        for completion in output.outputs:
            assert cpu_engine.logprob_difference(policy_of(trainer), prompt, completion) < 1e-4
            assert cpu_engine.logprob_difference(model, prompt, completion) > 1e-2, "the weights did not move"
        assert all(step["sampling/sampling_logp_difference/max"] < 1e-4 for step in trainer.state.log_history[:2])
    finally:
        cpu_engine.close(llm)


@pytest.fixture
def trained_on_a_server(model_folder, tmp_path, server_on_cpu):
    """Trains, and samples with the last weights: the trainer, and distances from a model that are asked for."""

    def run(lora: bool):
        server = {"vllm_server_base_url": server_on_cpu, "vllm_group_port": cpu_engine.free_port()}
        trainer = train(model_folder, str(tmp_path), lora, vllm_mode="server", **server)
        prompt = list(range(30, 50))
        answer = trainer.vllm_generation.vllm_client.generate([prompt], n=4, max_tokens=20)
        pairs = [
            (ids, [step[0] for step in logprobs])
            for ids, logprobs in zip(answer["completion_ids"], answer["logprobs"], strict=True)
        ]
        return trainer, lambda scorer: [cpu_engine.distance(scorer, prompt, *pair) for pair in pairs]

    return run


def test_server(model, trained_on_a_server):
    trainer, distances = trained_on_a_server(lora=False)
    assert max(distances(policy_of(trainer))) < 1e-4
    assert min(distances(model)) > 1e-2, "the weights did not move"
    assert all(step["sampling/sampling_logp_difference/max"] < 1e-4 for step in trainer.state.log_history[:2])


def test_trl_alone_sends_a_server_the_base_of_an_adapter(model, trained_on_a_server):
    """It packs up to a GB of tensors when the last is read, and by then has taken the adapter out of them again."""
    trainer, distances = trained_on_a_server(lora=True)
    assert max(distances(model)) < 1e-4
    assert min(distances(policy_of(trainer))) > 1e-2
