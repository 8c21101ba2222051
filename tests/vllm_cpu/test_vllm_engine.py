"""The engine's own record against a Transformers forward: every position, every MoE layer."""

from __future__ import annotations

from typing import Any

import cpu_engine
import numpy as np
import pytest
import torch

from trl_r3 import decode_vllm_http, decode_vllm_output
from trl_r3.engines.vllm_versions import vllm_engine_kwargs

pytestmark = pytest.mark.vllm

BLOCK = 32  # tokens of a KV-cache block: what the prefix cache shares


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, cpu_engine.VOCAB_SIZE, (count,), generator=generator).tolist()


def start(folder, **kwargs) -> Any:
    from vllm import LLM, __version__

    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": BLOCK, "seed": 0}
    return LLM(str(folder), **{**defaults, "disable_log_stats": False, **vllm_engine_kwargs(__version__), **kwargs})


@pytest.fixture
def llm(model_folder):
    # An engine whose step raised never ends its next generate: every test has its own.
    llm = start(model_folder, max_num_batched_tokens=48, max_num_seqs=16, enable_chunked_prefill=True)
    yield llm
    cpu_engine.close(llm)


def generate(llm, prompts: list[list[int]], **sampling) -> list[Any]:
    from vllm import SamplingParams

    torch.manual_seed(0)  # a seed in the sampling parameters fails on a CPU when prefill is chunked
    sampling = {"temperature": 1.0, "logprobs": 0, **sampling}
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, SamplingParams(**sampling), use_tqdm=False)


def metric(llm, name: str) -> int:
    return next(item.value for item in llm.get_metrics() if item.name == f"vllm:{name}")


def assert_routes_match(model, outputs: list[Any]) -> None:
    for output in outputs:
        prompt = list(output.prompt_token_ids)
        for completion in output.outputs:
            ids = decode_vllm_output(completion)
            sequence = [*prompt, *completion.token_ids]
            wrong, pairs = cpu_engine.mismatches(model, sequence, ids)
            assert wrong == 0, f"{wrong} of {pairs} pairs of position and layer differ"
            assert cpu_engine.logprob_difference(model, prompt, completion) < 1e-4


def test_several_completions_of_a_prompt(llm, model):
    outputs = generate(llm, [tokens(7, 1), tokens(20, 2), tokens(1, 3)], n=3, max_tokens=24)
    assert [len(output.outputs) for output in outputs] == [3, 3, 3]
    assert len({completion.token_ids[-1] for completion in outputs[0].outputs}) > 1
    assert_routes_match(model, outputs)


def test_record_is_one_byte_an_id_with_empty_dense_slots(llm):
    completion = generate(llm, [tokens(9, 4)], max_tokens=5, ignore_eos=True)[0].outputs[0]
    ids = decode_vllm_output(completion)
    assert ids.dtype == np.uint8 and ids.shape == (9 + 5 - 1, 4, 2)
    assert not ids[:, 1].any() and ids[:, [0, 2, 3]].any((0, 2)).all()


def test_one_token(llm, model):
    outputs = generate(llm, [tokens(7, 5), tokens(20, 6), tokens(1, 7)], max_tokens=1)
    assert [len(decode_vllm_output(output.outputs[0])) for output in outputs] == [7, 20, 1]
    assert_routes_match(model, outputs)


def test_chunked_prefill(llm, model):
    prompts = [tokens(100, 8), tokens(150, 9)]
    assert min(map(len, prompts)) > llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    assert_routes_match(model, generate(llm, prompts, max_tokens=8))


def test_prefix_cache_hit(llm, model):
    prompt = tokens(100, 10)
    generate(llm, [prompt], max_tokens=8)
    outputs = generate(llm, [prompt, prompt[:70] + tokens(20, 11)], n=2, max_tokens=8)
    assert [output.num_cached_tokens for output in outputs] == [3 * BLOCK, 2 * BLOCK]
    assert_routes_match(model, outputs)


def test_prefix_cache_hit_on_sampled_tokens(llm, model):
    first = generate(llm, [tokens(20, 12)], max_tokens=60, ignore_eos=True)[0]
    turn = [*first.prompt_token_ids, *first.outputs[0].token_ids]
    outputs = generate(llm, [turn + tokens(5, 13)], max_tokens=8)
    assert outputs[0].num_cached_tokens == 2 * BLOCK
    assert_routes_match(model, outputs)


@pytest.mark.skipif(cpu_engine.SECOND_RUNNER, reason="vLLM 0.31 and later refuse it (test_vllm_refusals.py)")
def test_without_a_prefix_cache(model, model_folder):
    llm = start(model_folder, enable_prefix_caching=False)
    try:
        outputs = [generate(llm, [tokens(100, 10)], n=2, max_tokens=8) for _ in range(2)]
        assert outputs[1][0].num_cached_tokens == 0
        assert_routes_match(model, [*outputs[0], *outputs[1]])
    finally:
        cpu_engine.close(llm)


@pytest.mark.skipif(not cpu_engine.SECOND_RUNNER, reason="vLLM 0.30 refuses all connectors (test_vllm_refusals.py)")
def test_no_stale_rows_behind_a_hit_in_an_external_cache(model, model_folder, tmp_path):
    """Keys and values survive a reset outside the engine, routes do not: it fails, and makes up none."""
    outside = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    outside["kv_connector_extra_config"] = {"shared_storage_path": str(tmp_path)}
    llm = start(model_folder, kv_transfer_config=outside)
    prompt = tokens(100, 10)
    try:
        outputs = [generate(llm, [prompt], max_tokens=8)[0] for _ in range(2)]
        assert [output.num_cached_tokens for output in outputs] == [0, 3 * BLOCK]
        assert_routes_match(model, outputs)
        assert llm.reset_prefix_cache()  # as TRL does when it has sent weights
        with pytest.raises(RuntimeError, match="auxiliary output object does not exist"):
            generate(llm, [prompt], max_tokens=8)
    finally:
        cpu_engine.close(llm)


@pytest.mark.skipif(not cpu_engine.SECOND_RUNNER, reason="a draft model of vLLM 0.30 needs a GPU")
def test_a_draft_model_is_refused_with_routes(model_folder):
    from vllm.distributed import cleanup_dist_env_and_memory

    draft = {"method": "draft_model", "model": str(model_folder), "num_speculative_tokens": 2}
    try:
        with pytest.raises(ValueError, match="AuxOutput Connector only supports generate runners"):
            start(model_folder, speculative_config=draft)
    finally:
        cleanup_dist_env_and_memory()
    cpu_engine.close(start(model_folder, speculative_config=draft, enable_return_routed_experts=False))


def test_end_token_first(llm, model):
    outputs = generate(llm, [tokens(9, 14)], n=2, max_tokens=50, logit_bias={cpu_engine.EOS: 100.0}, logprobs=None)
    for completion in outputs[0].outputs:
        assert list(completion.token_ids) == [cpu_engine.EOS] and completion.finish_reason == "stop"
        ids = decode_vllm_output(completion)
        assert cpu_engine.mismatches(model, [*outputs[0].prompt_token_ids, cpu_engine.EOS], ids)[0] == 0


@pytest.mark.parametrize(
    "stop", [{"stop_token_ids": list(range(3, 30))}, {"stop": [f"t{i}" for i in range(100, 110)]}]
)
def test_early_stops_in_a_crowd(llm, model, stop):
    outputs = generate(llm, [tokens(5 + i, 20 + i) for i in range(12)], n=2, max_tokens=40, **stop)
    completions = [completion for output in outputs for completion in output.outputs]
    assert sum(completion.finish_reason == "stop" for completion in completions) > 12
    assert len({len(completion.token_ids) for completion in completions}) > 5
    assert_routes_match(model, outputs)


def test_preemption(model, model_folder):
    llm = start(model_folder, num_gpu_blocks_override=12, max_num_seqs=16)
    try:
        outputs = generate(llm, [tokens(40, 40 + i) for i in range(8)], max_tokens=60, ignore_eos=True)
        assert metric(llm, "num_preemptions") > 0
        assert_routes_match(model, outputs)
    finally:
        cpu_engine.close(llm)


@pytest.mark.parametrize("build, experts, dtype", [("tiny_mixtral", 8, "uint8"), ("tiny_qwen3_moe", 300, "uint16")])
def test_other_models(build, experts, dtype, tmp_path):
    model = getattr(cpu_engine, build)(num_experts=experts)
    llm = start(cpu_engine.save_with_tokenizer(model, tmp_path))
    try:
        outputs = generate(llm, [tokens(30, 50), tokens(90, 51)], n=2, max_tokens=20)
        assert decode_vllm_output(outputs[0].outputs[0]).dtype == dtype
        assert_routes_match(model, outputs)
    finally:
        cpu_engine.close(llm)


def test_the_oracle_sees_a_shift(llm, model):
    output = generate(llm, [tokens(30, 60)], max_tokens=20, ignore_eos=True)[0]
    sequence = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    ids = decode_vllm_output(output.outputs[0])
    for wrong_ids in (np.roll(ids, 1, 0), np.roll(ids, 1, 1), np.zeros_like(ids)):
        wrong, pairs = cpu_engine.mismatches(model, sequence, wrong_ids)
        assert wrong > pairs / 2


def test_server(server_url, model):
    prompts = [tokens(3, 70), tokens(40, 71), tokens(1, 72)]
    body = {"model": cpu_engine.request(f"{server_url}/v1/models")["data"][0]["id"], "prompt": prompts, "n": 2}
    body |= {"max_tokens": 12, "temperature": 1.0, "return_token_ids": True}
    choices = cpu_engine.request(f"{server_url}/v1/completions", body)["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [prompt for prompt in prompts for _ in range(2)]
    for choice in choices:
        ids = decode_vllm_http(choice["routed_experts"])
        wrong, pairs = cpu_engine.mismatches(model, choice["prompt_token_ids"] + choice["token_ids"], ids)
        assert wrong == 0, f"{wrong} of {pairs} pairs of position and layer differ"


def test_server_describes_itself(server_url):
    from vllm import __version__

    assert cpu_engine.request(f"{server_url}/version") == {"version": __version__.split("+")[0]}
    config = cpu_engine.request(f"{server_url}/server_info?config_format=json")["vllm_config"]
    assert cpu_engine.routes_section(config)["enable_return_routed_experts"] is True
