"""Asynchronous GRPO on a real server: every trained row is what it answered, also where the weights came in between.

Legend: T tokens of prompt and completion, D decoder layers, K experts per token.
"""

from __future__ import annotations

import base64
import copy
import io
import time

import cpu_engine
import numpy as np
import pytest
import torch
from engines.model_server import Answer
from engines.tiny_chat import make_tokenizer
from trainers.async_runs import ThreadedWorker, count_wrong, make_trainer, without_gpu
from trl.experimental.async_grpo import async_grpo_trainer
from trl.experimental.async_grpo.async_rollout_worker import _AsyncRolloutLoop

from trl_r3.cli.experts import executed_ids

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        cpu_engine.SECOND_RUNNER,
        reason="vLLM 0.32 for CPUs dies in its attention when weights come while requests are running",
    ),
]
MOE_LAYERS = [0, 2, 3]


class SentWeights:
    """
    A transfer for TRL's `weight_transfer`, by TRL's client for synchronous training; keeps what was sent.

    Updates come while the server answers: on busy cores the loop that asks can lag so far behind the trainer that no
    request would meet one.
    """

    def __init__(self, base_url: str, sent: list[dict[str, torch.Tensor]]):
        from trl.generation.vllm_client import VLLMClient

        self.client = VLLMClient(base_url=base_url, group_port=cpu_engine.free_port())
        self.sent = sent

    def init_weight_transfer(self) -> None:
        self.client.init_communicator(torch.device("cpu"))

    def pause(self) -> None:
        if self.sent:  # the first weights come before any request
            wait_until_answering(self.client.base_url)
        cpu_engine.request(f"{self.client.base_url}/pause?mode=keep", {})

    def send_weights(self, iterator) -> None:
        weights = {name: weight.detach().clone() for name, weight in iterator}
        about = [
            (name, str(weight.dtype).removeprefix("torch."), list(weight.shape)) for name, weight in weights.items()
        ]
        self.client.update_named_params(about, iter(weights.items()))
        self.sent.append(weights)

    def resume(self) -> None:
        cpu_engine.request(f"{self.client.base_url}/resume", {})

    def destroy(self) -> None:
        self.client.close_communicator()


def wait_until_answering(base_url: str, timeout: float = 60.0) -> None:
    """Return in the middle of answers: some are running, and have got tokens since the call."""
    deadline = time.monotonic() + timeout
    first = None
    while True:
        running, tokens = read_counters(base_url, "vllm:num_requests_running", "vllm:generation_tokens_total")
        first = tokens if first is None else first
        if running and tokens > first:
            return
        assert time.monotonic() < deadline, f"the server answers nothing: {running} running, {tokens - first} tokens"
        time.sleep(0.002)


def read_counters(base_url: str, *names: str) -> list[float]:
    """Of the server's metrics: those of these names."""
    from prometheus_client.parser import text_string_to_metric_families  # vLLM's own

    families = text_string_to_metric_families(cpu_engine.read(f"{base_url}/metrics").decode())
    values = {sample.name: sample.value for family in families for sample in family.samples}
    return [values[name] for name in names]


@pytest.fixture
def sent():
    """The weights of each update. They come while the server is paused, so no row is of an update still to be here."""
    return []


@pytest.fixture
def answers(monkeypatch, sent):
    """
    What the server answered, read from the wire by NumPy; `updates` are those sent before the request and the answer.
    TRL's own count goes on after the server does: an answer can have rows of an update that it does not count yet.
    """
    found: list[Answer] = []
    own = _AsyncRolloutLoop._post

    async def post(self, path, payload, *args, **kwargs):
        sent_at = len(sent)
        answer = await own(self, path, payload, *args, **kwargs)
        for choice in answer["choices"]:
            rows = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))
            found.append(Answer(payload["prompt"], choice["token_ids"], rows, (sent_at, len(sent))))
        return answer

    monkeypatch.setattr(_AsyncRolloutLoop, "_post", post)
    return found


@pytest.fixture
def train(server_on_cpu, model_folder, tmp_path, monkeypatch, sent):
    without_gpu(monkeypatch.setattr)
    monkeypatch.setattr(async_grpo_trainer, "AsyncRolloutWorker", ThreadedWorker)
    server = type("Server", (), {"base_url": server_on_cpu})

    tokenizer = make_tokenizer()
    del tokenizer.response_template["fields"]["tool_calls"]  # no answer of random weights is a call by chance

    def run(**settings):
        transfer = SentWeights(server_on_cpu, sent)
        settings = {"processing_class": tokenizer, **settings}
        trainer = make_trainer(server, model_folder, tmp_path / "out", transfer=transfer, **settings)
        trainer.train()
        return trainer

    return run


def logged(trainer, name):
    return [log[name] for log in trainer.state.log_history if log.get(name) is not None]


def test_rows_of_stale_samples_and_of_requests_across_updates(train, answers, sent, model):
    trainer = train(max_steps=4, learning_rate=3e-2, max_completion_length=60, max_inflight_tasks=24, max_staleness=4)
    wrong, total = count_wrong(trainer.forwards, answers, MOE_LAYERS)
    assert (wrong, total > 400) == (0, True)
    assert logged(trainer, "routing_replay/replayed_frac") == [1.0] * 4
    assert logged(trainer, "routing_replay/fresh/changed_router_frac")[0] < 0.01
    assert logged(trainer, "routing_replay/agreement")[0] > 0.9
    assert max(logged(trainer, "routing_replay/changed_router_frac")) > 0.05
    assert max(logged(trainer, "routing_replay/staleness")) >= 1
    assert abs(trainer.forwards[0].ratio - 1) < 1e-3
    check_requests_across_an_update(answers, sent, model)


def check_requests_across_an_update(answers: list[Answer], sent: list[dict], model) -> None:
    """
    Each token has the row of the first time that it was fed: up to the update those of the old weights, behind it
    those of the new ones, over all tokens. The cache is filled anew meanwhile, and leaves no trace in the answer.
    """
    across = [each for each in answers if each.updates[1] == each.updates[0] + 1]
    fewest = []
    for each in across:
        old, new = (differs(each, with_weights(model, sent[version - 1])) for version in each.updates)
        ends = range(len(each.rows) + 1)
        fewest.append(min((int(old[:end].sum() + new[end:].sum()), end) for end in ends))
    assert across and [count for count, _ in fewest] == [0] * len(fewest)
    mixed = [each for each, (_, end) in zip(across, fewest, strict=True) if 0 < end < len(each.rows)]
    print(f"{len(across)} requests across an update, {len(mixed)} of them with rows of both weights")
    assert mixed


def with_weights(model, weights: dict[str, torch.Tensor]):
    other = copy.deepcopy(model)
    other.load_state_dict(weights, strict=False)
    return other


@torch.no_grad()
def differs(answer: Answer, model) -> torch.Tensor:
    """(T - 1, L): where rows differ from those of a forward."""
    with executed_ids(model) as seen:
        model(torch.tensor([answer.tokens[:-1]]), use_cache=False)
    rows = torch.stack([seen[layer][0] for layer in MOE_LAYERS], 1).long().sort(-1).values
    recorded = torch.from_numpy(answer.rows[:, MOE_LAYERS].astype(np.int64)).sort(-1).values
    return (rows != recorded).any(-1)
