"""TRL's own GRPO against engines on a CPU: the stand-ins carry every weight update."""

from __future__ import annotations

import cpu_engine
import pytest
from datasets import Dataset

pytestmark = pytest.mark.vllm


def count_distinct(completions, completion_ids, **kwargs) -> list[float]:
    return [float(len(set(ids))) for ids in completion_ids]


def train(model_folder, output: str, **vllm):
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
    trainer = GRPOTrainer(str(model_folder), reward_funcs=count_distinct, args=args, train_dataset=prompts)
    trainer.train()
    trainer.vllm_generation.sync_weights()
    return trainer


def test_colocate(model, model_folder, tmp_path, colocate_on_cpu):
    from vllm import SamplingParams

    trainer = train(model_folder, str(tmp_path), vllm_mode="colocate", vllm_max_model_length=256)
    llm = trainer.vllm_generation.llm
    try:
        prompt = list(range(30, 50))
        sampling = SamplingParams(n=4, max_tokens=20, logprobs=0)
        [output] = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        for completion in output.outputs:
            assert cpu_engine.logprob_difference(trainer.model.eval(), prompt, completion) < 1e-4
            assert cpu_engine.logprob_difference(model, prompt, completion) > 1e-2, "the weights did not move"
        assert all(step["sampling/sampling_logp_difference/max"] < 1e-4 for step in trainer.state.log_history[:2])
    finally:
        cpu_engine.close(llm)


def test_server(model, model_folder, tmp_path, server_on_cpu):
    trainer = train(model_folder, str(tmp_path), vllm_mode="server", vllm_server_base_url=server_on_cpu)
    prompt = list(range(30, 50))
    answer = trainer.vllm_generation.vllm_client.generate([prompt], n=4, max_tokens=20)
    for ids, logprobs in zip(answer["completion_ids"], answer["logprobs"], strict=True):
        sampled = [step[0] for step in logprobs]
        assert cpu_engine.distance(trainer.model.eval(), prompt, ids, sampled) < 1e-4
        assert cpu_engine.distance(model, prompt, ids, sampled) > 1e-2, "the weights did not move"
    assert all(step["sampling/sampling_logp_difference/max"] < 1e-4 for step in trainer.state.log_history[:2])
