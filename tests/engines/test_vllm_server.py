"""The client of a vLLM server, against one that runs in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines.fake_vllm import completion_of, fake_vllm, npy_base64, routes_of
from engines.watch import assert_nothing_missing, assert_replayed
from trl.generation import vllm_client, vllm_generation

from trl_r3 import RoutingLayout
from trl_r3.engines.vllm_server import RecordingVLLMClient, recorded_server

PROMPTS = [[20 + i] * (1 + i % 4) for i in range(24)]
SHAPE = RoutingLayout(moe_layers=(0, 2, 3), num_decoder_layers=4, num_experts=16, top_k=4)


@pytest.fixture
def client_of(installed):
    return lambda fake: RecordingVLLMClient(base_url=fake.base_url, routes=True)


def test_one_request_a_prompt_in_order(client_of):
    with fake_vllm(longest_delay=0.1) as fake:
        client = client_of(fake)
        answer = client.generate(PROMPTS, n=3, max_tokens=8, temperature=0.7, generation_kwargs={"seed": 5})
    assert [len(request["prompt"]) for request in fake.requests] == [1] * len(PROMPTS)
    assert sorted(request["prompt"][0] for request in fake.requests) == PROMPTS
    assert {(r["n"], r["max_tokens"], r["temperature"], r["seed"]) for r in fake.requests} == {(3, 8, 0.7, 5)}
    assert fake.most_at_once > 1, "the requests waited for each other"
    assert answer["prompt_ids"] == PROMPTS
    completions = [completion_of(prompt, index) for prompt in PROMPTS for index in range(3)]
    assert answer["completion_ids"] == completions
    assert answer["logprobs"] == [[[-0.5 - 0.01 * token] for token in tokens] for tokens in completions]
    assert answer["logprob_token_ids"] == [[[token] for token in tokens] for tokens in completions]
    sequences = [prompt + completion_of(prompt, index) for prompt in PROMPTS for index in range(3)]
    routes = client.take_routes()
    assert len(routes) == len(sequences)
    for ids, sequence in zip(routes, sequences, strict=True):
        assert ids.dtype == np.uint8 and np.array_equal(ids, routes_of(sequence))
    assert client.take_routes() == [], "routes are handed over once"


def test_the_answer_is_that_of_trl(client_of, installed):
    with fake_vllm() as fake:
        sampling = {"n": 2, "max_tokens": 8}
        routed = client_of(fake).generate(PROMPTS, **sampling)
        assert routed == vllm_client.VLLMClient(base_url=fake.base_url).generate(PROMPTS, **sampling)
    assert len(fake.requests[-1]["prompt"]) == len(PROMPTS), "TRL sends one request"


def test_without_logprobs(client_of):
    with fake_vllm() as fake:
        own = fake.complete
        fake.complete = lambda body: {"choices": [{**choice, "logprobs": None} for choice in own(body)["choices"]]}
        answer = client_of(fake).generate(PROMPTS[:3], n=2, logprobs=None)
    assert answer["logprobs"] is None and len(answer["completion_ids"]) == 6


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_failure_is_tried_again(client_of, status):
    with fake_vllm() as fake:
        client = client_of(fake)
        fake.failures = [status]
        client.generate(PROMPTS[:4], n=2)
    assert len(fake.requests) == 5
    sequences = [prompt + completion_of(prompt, index) for prompt in PROMPTS[:4] for index in range(2)]
    assert all(np.array_equal(i, routes_of(s)) for i, s in zip(client.take_routes(), sequences, strict=True))


def test_a_refusal_is_raised(client_of):
    with fake_vllm() as fake:
        client = client_of(fake)
        fake.failures = [400]
        with pytest.raises(Exception, match="Request failed: 400"):
            client.generate(PROMPTS[:4])


def test_a_server_that_sends_no_routes(client_of):
    with fake_vllm(returns_routes=False) as fake, pytest.raises(ValueError, match="no `routed_experts`"):
        client_of(fake).generate(PROMPTS[:1])


def test_a_server_that_sends_something_else(client_of):
    with fake_vllm() as fake:
        own = fake.complete
        pickled = npy_base64(np.array([{"a": 1}], dtype=object))
        fake.complete = lambda body: {"choices": [{**c, "routed_experts": pickled} for c in own(body)["choices"]]}
        with pytest.raises(ValueError, match="no .npy file of expert ids"):
            client_of(fake).generate(PROMPTS[:1])


@pytest.mark.parametrize(
    "version, info",
    [
        ("0.22.0", {"model_config": {"enable_return_routed_experts": True}}),
        ("0.30.0", {"model_config": {"enable_return_routed_experts": True}, "aux_output_config": None}),
        ("0.31.0", {"model_config": {}, "aux_output_config": {"enable_return_routed_experts": True}}),
        ("0.33.1", {"aux_output_config": {"enable_return_routed_experts": True}}),
    ],
)
def test_where_servers_keep_the_flag(client_of, version, info):
    with fake_vllm(version=version, info=info) as fake:
        client_of(fake)
    assert any(path == "/server_info?config_format=json" for path in fake.paths)


@pytest.mark.parametrize(
    "info",
    [
        {},
        {"model_config": {"enable_return_routed_experts": False}, "aux_output_config": None},
        {"model_config": {}, "aux_output_config": {"enable_return_routed_experts": False}},
    ],
)
def test_a_server_without_the_flag_is_told_how_to_start(client_of, info):
    with fake_vllm(info=info) as fake, pytest.raises(ValueError) as error:
        client_of(fake)
    line = (
        "VLLM_SERVER_DEV_MODE=1 vllm serve org/model --enable-return-routed-experts "
        """--weight-transfer-config '{"backend": "nccl"}' --logprobs-mode processed_logprobs --max-logprobs -1"""
    )
    assert (
        str(error.value).endswith(f"with: {line}")
        and "0.30.0" in str(error.value)
        and fake.base_url in str(error.value)
    )


def test_later_servers_are_told_their_model_runner(client_of):
    with fake_vllm(version="0.31.0", info={}) as fake, pytest.raises(ValueError) as error:
        client_of(fake)
    assert "with: VLLM_SERVER_DEV_MODE=1 VLLM_USE_V2_MODEL_RUNNER=1 vllm serve org/model " in str(error.value)
    assert "--enable-return-routed-experts --enable-prefix-caching" in str(error.value)


@pytest.mark.parametrize("version", ["0.21.3", "0.34.0"])
def test_versions_with_another_format_are_refused(client_of, version):
    with fake_vllm(version=version) as fake, pytest.raises(ValueError, match=version):
        client_of(fake)


def test_images_are_refused(client_of):
    with fake_vllm() as fake, pytest.raises(ValueError, match="multimodal"):
        client_of(fake).generate(PROMPTS[:1], features=[{"pixels": 1}])


def sampled_by(fake):
    """Tokens and MoE rows of all that the server completed."""
    sequences = [
        [*prompt, *completion_of(prompt, index)]
        for request in fake.requests
        for prompt in request["prompt"]
        for index in range(request["n"])
    ]
    return [(s, torch.from_numpy(routes_of(s)[:, [0, 2, 3]].astype(np.int64))) for s in sequences]


def test_training_replays_what_the_server_sent(server_trainer):
    """These routes are not what the model would select, so only replay can execute them."""
    with fake_vllm(longest_delay=0.02) as fake:
        trainer = server_trainer(fake)
        assert vllm_generation.VLLMClient is vllm_client.VLLMClient, "TRL's name was not given back"
        trainer.train()
    expected = sampled_by(fake)
    assert len(fake.requests) == 8 and len(expected) == 16
    assert_replayed(trainer, {0: expected})
    assert_nothing_missing(trainer, steps=2)
    assert all(
        log["routing_replay/changed_router_frac"] > 0.9 for log in trainer.state.log_history if "routing_replay" in log
    )


def test_routes_of_other_tokens_are_an_error(server_trainer):
    with fake_vllm() as fake:
        own = fake.complete

        def cut(body):
            answer = own(body)
            if body["prompt"] == [[40]]:
                choice = answer["choices"][1]
                tokens = choice["prompt_token_ids"] + choice["token_ids"]
                choice["routed_experts"] = npy_base64(routes_of(tokens)[:-1])
            return answer

        fake.complete = cut
        with pytest.raises(ValueError, match=r"sample [0-7]: the record has \d+ rows for \d+ tokens"):
            server_trainer(fake).train()


WHOLE = {"top_p": 1.0, "top_k": -1, "min_p": 0.0}  # -1 is vLLM's own word for all


@pytest.mark.parametrize(
    "sampling, settings",
    [
        ({"top_p": 0.8}, {}),
        ({"top_k": 5}, {}),
        ({"min_p": 0.1}, {}),
        ({}, {}),
        ({"top_p": 0.8}, {"generation_kwargs": {"top_p": 0.8}}),
        ({}, {"top_p": 0.8, "top_k": 5, "min_p": 0.1, "generation_kwargs": WHOLE}),
    ],
)
def test_truncated_sampling_is_not_called_mismatch(server_trainer, sampling, settings):
    """The engine's log-probabilities are over what was kept, which the trainer does not know."""
    with fake_vllm() as fake, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = server_trainer(fake, routing_replay_compare_every=1, **(settings or sampling))
        trainer.train()
    told = [str(each.message) for each in caught if "`sampling/*` is not logged" in str(each.message)]
    logged = [name for entry in trainer.state.log_history for name in entry if name.endswith("k3_kl")]
    assert len(told) == bool(sampling), "once, with the remedy"
    assert sorted(logged) == ([] if sampling else 2 * ["sampling/k3_kl"] + 2 * ["sampling/live/k3_kl"])
    asked = {name: fake.requests[0].get(name) for name in ("top_p", "top_k", "min_p")}
    assert asked == {"top_p": 1.0, "top_k": 0, "min_p": 0.0, **(WHOLE if settings and not sampling else sampling)}
    assert all(f"{name}={value}" in told[0] for name, value in sampling.items())


OTHER = [
    {"repetition_penalty": 1.3},
    {"generation_kwargs": {"presence_penalty": 0.5}},
    {"generation_kwargs": {"temperature": 0.5}},
]


@pytest.mark.parametrize("settings", OTHER)
def test_penalties_are_not_called_mismatch(server_trainer, settings):
    """The engine's log-probabilities are those of what it drew from, which training does not score."""
    ((name, value),) = settings.get("generation_kwargs", settings).items()
    with fake_vllm() as fake, pytest.warns(RuntimeWarning, match=f"^{name}={value} changes .*`sampling/.*not logged"):
        trainer = server_trainer(fake, routing_replay_compare_every=1, **settings)
        trainer.train()
    assert fake.requests[0][name] == value
    assert not any(name.startswith("sampling/k3") for entry in trainer.state.log_history for name in entry)


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.8}, *OTHER])
def test_they_are_no_reason_for_replay(server_trainer, sampling):
    with fake_vllm() as fake, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        server_trainer(fake, use_routing_replay=False, max_steps=4, **sampling).train()
    told = [str(each.message) for each in caught if "with live routing k3" in str(each.message)]
    assert len(told) == (not sampling), "what the server says is far from what the model does"


def test_a_server_without_the_flag_fails_at_construction(server_trainer):
    with fake_vllm(info={}) as fake, pytest.raises(ValueError, match="vllm serve org/model"):
        server_trainer(fake)
    assert vllm_generation.VLLMClient is vllm_client.VLLMClient, "TRL's name was not given back"


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_gets_its_share(monkeypatch, rank):
    """The main process asks the server for all and scatters; here what it scatters is looked at."""
    everything = [routes_of([20 + i] * (1 + i) + completion_of([20 + i], 0)) for i in range(4)]

    def scatter(received, shares, src):
        assert src == 0 and (shares is None) == (rank == 1)
        received[0] = everything[2:] if shares is None else shares[0]
        if shares is not None:
            assert [len(share) for share in shares] == [2, 2] and shares[1][0] is everything[2]

    monkeypatch.setattr(torch.distributed, "scatter_object_list", scatter)
    accelerator = SimpleNamespace(is_main_process=rank == 0, num_processes=2)
    # only the main process has a client
    client = {"vllm_client": SimpleNamespace(take_routes=lambda: everything)} if not rank else {}
    generation = SimpleNamespace(generate=None, **client)
    trainer = SimpleNamespace(vllm_generation=generation, accelerator=accelerator)
    prompts = [[20 + i] * (1 + i) for i in range(4)][2 * rank : 2 * rank + 2]
    with recorded_server(trainer, SHAPE, False, None) as make_turn:
        pass
    turn = make_turn(prompts, [completion_of(prompt[:1], 0) for prompt in prompts])
    expected = [ids[:, [0, 2, 3]].tolist() for ids in everything[2 * rank : 2 * rank + 2]]
    assert [record.tolist() for record in turn.records] == expected


def test_two_processes_train_on_one_server(installed, tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with fake_vllm() as fake:
        script = [str(Path(__file__).with_name("two_processes.py")), fake.base_url, str(tmp_path)]
        done = subprocess.run(launcher + script, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [(each["processes"], each["samples"], each["wrong"]) for each in reports] == [(2, 8, 0)] * 2
    assert all(each["pairs"] > 20 for each in reports)
    first = sorted(tokens for tokens, _ in sampled_by(fake)[:16])
    assert sorted(sum((each["tokens"] for each in reports), [])) == first
    assert all("vLLM bring [2, 1] prompts" in each["uneven"] for each in reports)  # TRL would mix them up
