"""
Sampling masks of a colocated vLLM.

vLLM makes masks in its second model runner, which needs Triton and so a GPU. Here the first runner samples; it is
asked for the processed log-probabilities of the whole vocabulary, and what is not -inf there is handed over as vLLM
hands over a mask. What top-p and top-k keep is the engine's own.
"""

from __future__ import annotations

import copy
from typing import Any

import cpu_engine
import pytest
from test_vllm_trainer import make

pytestmark = pytest.mark.vllm


def masking_llm(asked: dict[str, Any]) -> Any:
    """`vllm.LLM` that returns masks; `asked` gets the switches that it was built with."""
    from vllm.outputs import SamplingMask

    def build(*args: Any, return_sampling_mask: bool = False, **kwargs: Any) -> Any:
        asked["return_sampling_mask"] = return_sampling_mask
        kwargs.pop("enable_sleep_mode")
        llm = cpu_engine.cpu_llm(*args, max_logprobs=-1, **kwargs)
        own_generate = llm.generate

        def generate(prompts: Any, sampling_params: Any, **kwargs: Any) -> Any:
            everything = copy.copy(sampling_params)
            everything.logprobs = -1
            outputs = own_generate(prompts, sampling_params=everything, **kwargs)
            for completion in (each for output in outputs for each in output.outputs):
                steps = list(zip(completion.token_ids, completion.logprobs, strict=True))
                kept = [[token for token, one in step.items() if one.logprob > -float("inf")] for _, step in steps]
                completion.sampling_mask = SamplingMask(kept) if return_sampling_mask else None
                completion.logprobs = [{token: step[token]} for token, step in steps]
            return outputs

        llm.generate, asked["llm"] = generate, llm
        return llm

    return build


@pytest.fixture
def trained(tmp_path, model_folder, monkeypatch):
    """Trains on an engine that returns masks; the engine is closed afterwards."""
    from trl.generation import vllm_generation

    asked: dict[str, Any] = {}
    monkeypatch.setattr(vllm_generation, "LLM", masking_llm(asked))

    def run(**settings: Any) -> Any:
        sampling = {"top_p": 0.8, "top_k": 40, "temperature": 0.8}
        engine = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 256}
        trainer = make(tmp_path, model_folder, max_steps=2, **engine, **{**sampling, **settings})
        assert asked["return_sampling_mask"] == settings["use_sampling_mask_replay"]
        trainer.train()
        return trainer

    yield run
    cpu_engine.close(asked["llm"])


def differences(trainer: Any) -> list[float]:
    name = "sampling/sampling_logp_difference/mean"  # of TRL, between the engine and the old-policy pass
    return [float(log[name]) for log in trainer.state.log_history if name in log]


@pytest.mark.parametrize("routes", [False, True])
def test_training_is_over_what_vllm_kept(trained, routes):
    trainer = trained(use_sampling_mask_replay=True, use_routing_replay=routes)
    assert max(differences(trainer)) < 1e-5
    k3 = [float(log["sampling/k3_kl"]) for log in trainer.state.log_history if "sampling/k3_kl" in log]
    assert len(k3) == 2
    assert max(k3) <= 1e-10
    for sample in trainer._mask_rollout.samples:
        counts = sample.mask.counts
        assert len(counts) == len(sample.tokens) - sample.prompt_length
        assert 0 < int(counts.min()) <= int(counts.max()) <= 40


def test_without_masks_every_ratio_is_off(trained):
    """TRL's own figure on the same engine: the lost mass."""
    with pytest.warns(RuntimeWarning, match="every importance ratio is off, and `sampling/\\*` is not logged"):
        trainer = trained(use_sampling_mask_replay=False, use_routing_replay=True)
    assert min(differences(trainer)) > 1e-2
    assert not any("sampling/k3_kl" in log for log in trainer.state.log_history)
