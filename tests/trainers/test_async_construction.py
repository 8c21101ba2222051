"""What asynchronous GRPO refuses by name, and what it warns of, before anything is rolled out."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
from engines.fake_vllm import CAPTURES, fake_vllm
from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker
from trl.experimental.async_grpo.vllm_client import VLLMClient

from trl_r3 import R3AsyncGRPOConfig
from trl_r3.trainers.async_construction import _ONLY, check_async_config, check_server, check_worker, warn_of_ratio
from trl_r3.trainers.config import RoutingReplayConfigMixin


def config(**settings):
    return R3AsyncGRPOConfig("out", use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"routing_replay_mode": "R2"}, "there is no old-policy forward .* `routing_replay_mode='R3'`"),
        ({"routing_replay_compare_every": 2}, "TRL scores a batch once. Set `routing_replay_compare_every=0`"),
        ({"routing_replay_load_every": 3}, "no rollouts to log the load of. Set `routing_replay_load_every=0`"),
        ({"routing_replay_padding": "auto"}, "packed rows have no padding. Set `routing_replay_padding='keep'`"),
        ({"routing_replay_trace_dir": "traces"}, "a trace holds a whole rollout. Set `routing_replay_trace_dir=None`"),
        ({"routing_replay_spill_dir": "spill"}, "records wait in the queue"),
        ({"use_sampling_mask_replay": True}, "its requests return no masks. Set `use_sampling_mask_replay=False`"),
        ({"routing_replay_in_flight": "pause"}, r"`routing_replay_in_flight` is 'pause', expected one of"),
        ({"routing_replay_shared_rows": "last"}, r"`routing_replay_shared_rows` is 'last', expected one of"),
        ({"routing_replay_max_missing": 2.0}, "`routing_replay_max_missing` is 2.0, but it is a share"),
        ({"routing_replay_alarm": "loud"}, "`routing_replay_alarm` is 'loud', expected one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        config(use_routing_replay=True, **settings)
    later = config(use_routing_replay=True)
    for name, value in settings.items():
        setattr(later, name, value)
    with pytest.raises(ValueError, match=words):
        check_async_config(later)


@pytest.mark.parametrize("in_flight", ["replay", "live"])
def test_settings_that_work(in_flight):
    check_async_config(config(use_routing_replay=True, routing_replay_in_flight=in_flight))


class Derived(AsyncRolloutWorker):
    def __init__(self, **loop_kwargs):
        self._loop_kwargs = loop_kwargs


def test_workers():
    check_worker(Derived(max_tokens=3))
    check_worker(Derived(harness_session_factory=list, harness_adapter=object()))
    with pytest.raises(ValueError, match="Derived without `harness_adapter`: the agent asks the server itself"):
        check_worker(Derived(harness_session_factory=list, harness_adapter=None))
    with pytest.raises(TypeError, match="is a SimpleNamespace, whose samples carry no routes"):
        check_worker(SimpleNamespace(rollout_buffer=None))


def test_servers():
    with fake_vllm() as fake:
        client = VLLMClient(fake.base_url, 5)
        assert check_server(client, "org/model")["model_config"] == CAPTURES
        fake.info = {"model_config": {}, "aux_output_config": {"enable_return_routed_experts": True}}
        check_server(client, "org/model")
        fake.info = {"model_config": {}}
        words = "does not return routed experts. Start it with: .*vllm serve org/model --enable-return-routed-experts"
        with pytest.raises(ValueError, match=words):
            check_server(client, "org/model")
        fake.version = "0.21.0"
        with pytest.raises(ValueError, match=r"vLLM 0.21.0 is installed, routing replay needs 0.22"):
            check_server(client, "org/model")


@pytest.mark.parametrize(
    ("settings", "mode", "words"),
    [
        ({"top_p": 0.9}, "processed_logprobs", "^top_p=0.9 changes the distribution"),
        ({"top_k": 5, "min_p": 0.1}, "processed_logprobs", "^top_k=5, min_p=0.1 changes"),
        ({"repetition_penalty": 1.1}, "processed_logprobs", "^repetition_penalty=1.1 changes"),
        ({"temperature": 0.7}, "raw_logprobs", "mode raw_logprobs, without temperature 0.7"),
        ({}, "processed_logits", r"returns logits in place of log-probabilities \(mode processed_logits\)"),
        ({}, "raw_logits", r"returns logits in place of log-probabilities \(mode raw_logits\)"),
    ],
)
def test_what_enters_the_ratio_is_warned_of(settings, mode, words):
    with pytest.warns(RuntimeWarning, match=words):
        warn_of_ratio(config(**settings), {"model_config": {"logprobs_mode": mode}})


@pytest.mark.parametrize(
    ("settings", "mode"),
    [({}, "processed_logprobs"), ({}, "raw_logprobs"), ({"temperature": 0.7}, "processed_logprobs"), ({}, None)],
)
def test_what_does_not_is_not(settings, mode):
    """Without temperature and truncation raw log-probabilities are those of the distribution."""
    args = config(**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_ratio(args, {"model_config": {"logprobs_mode": mode}})


def test_every_setting_of_replay_is_used_or_refused():
    """A setting that somebody adds for other trainers must not be without effect here."""
    used = {"use_routing_replay", "routing_replay_max_missing", "routing_replay_gating", "routing_replay_alarm"}
    with_traces = {"routing_replay_trace_every"}
    known = {field.name for field in dataclasses.fields(RoutingReplayConfigMixin)}
    assert known == used | with_traces | set(_ONLY)


WITHOUT_REQUESTS = """
import sys
sys.modules["requests"] = None
try:
    import datasets
except ImportError:
    sys.exit(print("datasets"))
import trl_r3
print(trl_r3.R3AsyncGRPOTrainer.__name__)
"""


def test_the_trainer_is_imported_where_nothing_talks_to_a_server():
    """Without `requests`, which is no requirement of TRL."""
    run = subprocess.run([sys.executable, "-c", WITHOUT_REQUESTS], capture_output=True, text=True)
    if run.stdout.split() == ["datasets"]:
        pytest.skip("this version of datasets imports requests itself")
    assert run.stdout.split() == ["R3AsyncGRPOTrainer"], run.stderr[-2000:]
