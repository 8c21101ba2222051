"""
Asynchronous trainings in seconds: a server in this process, the rollout loop on a thread, experts that are watched.

What TRL needs a GPU or vLLM for is replaced: the attention kernel of its trees by a loop of the same signature, the
transfer of weights by a copy.

Legend: N forwarded tokens of a packed row, T tokens of a sequence, D decoder layers, K experts per token.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engines.model_server import Answer
from engines.tiny_chat import conversations, make_tokenizer
from trl.experimental.async_grpo import AsyncGRPOTrainer, async_grpo_trainer, async_rollout_worker, packing
from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker

from trl_r3 import R3AsyncGRPOConfig, R3AsyncGRPOTrainer
from trl_r3.cli.experts import watched_experts

PROMPTS = ["t30 t31 t32", "t40 t41", "t50 t51 t52 t53", "t60 t61"]


def attend(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, softcap=0.0):
    """`flash_attn_varlen_func` of FA3: segments of (tokens, heads, head size), causal from the end."""
    assert causal and window_size == (-1, -1) and not softcap
    outputs = []
    for i in range(len(cu_q) - 1):
        of_q, of_k = slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1]))
        queries, keys, values = (x.transpose(0, 1)[None] for x in (q[of_q], k[of_k], v[of_k]))
        before = keys.shape[2] - queries.shape[2]
        mask = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool).tril(before)
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=softmax_scale, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def without_gpu(patch: Any) -> None:
    """Let TRL's AsyncGRPO run here; `patch` is `setattr`, or that of a `MonkeyPatch`."""
    patch(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=attend))
    patch(async_rollout_worker, "is_vllm_available", lambda *args, **kwargs: True)
    patch(async_grpo_trainer, "get_peak_flops_per_device", lambda *args, **kwargs: None)


class ThreadedWorker(AsyncRolloutWorker):
    """TRL's worker, whose loop runs on a thread of this process: no seconds of imports."""

    def start(self) -> None:
        self._heartbeat_value.value = float("inf")
        self._loop = self._loop_cls(
            **self._loop_kwargs,
            rollout_buffer=self.rollout_buffer,
            model_version_value=self._model_version_value,
            heartbeat_value=SimpleNamespace(value=0.0),
            failed_event=self._failed_event,
            exception_info_queue=self._exception_info_queue,
            metrics_queue=self.metrics_queue,
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with suppress(Exception):  # told by `check_health`
            self._loop.run()

    def stop(self) -> None:
        if getattr(self, "_loop", None) is not None:
            with suppress(RuntimeError):  # it has ended
                self._loop._loop.call_soon_threadsafe(self._loop._stop_event.set)
            self._thread.join(timeout=30)
            assert not self._thread.is_alive()
            self._loop = None


@dataclass
class Forward:
    """One packed row that was trained."""

    tokens: torch.Tensor  # (N,)
    depths: torch.Tensor  # (N,)
    step: int
    ratio: float = float("nan")
    calls: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # by layer: (N, K), with those of recomputes

    @property
    def executed(self) -> list[torch.Tensor]:
        """(N, L, K) of the forward, and of each recompute."""
        return [torch.stack(each, 1) for each in zip(*(self.calls[n] for n in sorted(self.calls)), strict=True)]

    def sequences(self) -> list[list[int]]:
        """The positions of each sequence: from a root to a leaf, depth first."""
        found, path = [], []
        depths = [*self.depths.tolist(), 0]
        for at in range(len(self.tokens)):
            path = [*path[: depths[at]], at]
            if depths[at + 1] <= depths[at]:
                found.append(path)
        return found


class Watching(AsyncGRPOTrainer):
    """TRL's trainer, taking notes. Goes below the code under test in the order of method resolution."""

    def __init__(self, *args, **kwargs):
        self.forwards: list[Forward] = []
        self._open: Forward | None = None
        super().__init__(*args, **kwargs)
        self._watch = ExitStack()
        self._watch.enter_context(watched_experts(self.model, self._note))

    def _note(self, layer, ids):
        if self._open is not None:
            self._open.calls.setdefault(layer, []).append(ids)

    def compute_loss(self, model, inputs, *args, **kwargs):
        real = inputs["attention_mask"].bool()
        self._open = Forward(inputs["input_ids"][real], inputs["position_ids"][real], self.state.global_step)
        self.forwards.append(self._open)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self._open.ratio = self._metrics["train"]["ratio"][-1]
        return loss

    def training_step(self, *args, **kwargs):
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self._open = None


class WatchedAsync(R3AsyncGRPOTrainer, Watching):
    """The trainer under test, watched."""


def by_index(completions, **kwargs):
    """A reward that differs within each group."""
    return [float(i % 3) for i in range(len(completions))]


def make_trainer(server: Any, folder: Any, output: Any, *, transfer: Any, **changes: Any) -> WatchedAsync:
    """One that trains for some steps; what is no setting of its config is an argument of its own."""
    passed = {
        name: changes.pop(name) for name in ("tools", "peft_config", "rollout_worker", "callbacks") if name in changes
    }
    reward = changes.pop("reward", by_index)
    prompts = changes.pop("prompts", PROMPTS)
    tokenizer = changes.pop("processing_class", None) or make_tokenizer()
    settings = {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 4,
        "max_inflight_tasks": 8,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "token_budget": 0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        "vllm_server_base_url": server.base_url,
        "use_routing_replay": True,
    }
    return WatchedAsync(
        model=str(folder),
        args=R3AsyncGRPOConfig(**{**settings, **changes}),
        reward_funcs=reward,
        train_dataset=conversations(prompts),
        processing_class=tokenizer,
        weight_transfer=transfer,
        **passed,
    )


def count_wrong(forwards: list[Forward], answers: list[Answer], layers: list[int]) -> tuple[int, int]:
    """
    How many rows went through other experts than the server answered for their token, and how many there are.

    Right is the row of a request that fed the token after the same tokens, unless an earlier turn of its conversation
    had fed it. The last token of a sequence has no row.
    """
    wrong = total = 0
    for one in forwards:
        executed = one.executed
        expected = [expected_rows(one.tokens[path].tolist(), answers) for path in one.sequences()]
        for path, candidates in zip(one.sequences(), expected, strict=True):
            for at, rows in zip(path, candidates, strict=True):
                if rows is None:
                    continue
                right = [torch.from_numpy(row[layers].astype(np.int64)).sort(-1).values for row in rows]
                for each in executed:
                    total += 1
                    mine = each[at].long().sort(-1).values
                    wrong += not any(torch.equal(mine, row) for row in right)
    return wrong, total


def expected_rows(tokens: list[int], answers: list[Answer]) -> list[list[np.ndarray] | None]:
    """By position, the rows that may stand there; `None` at the last one."""
    agreed = [(each, agreement(each.tokens, tokens)) for each in answers]
    agreed = [(each, count) for each, count in agreed if count]
    found: list[list[np.ndarray] | None] = []
    for at in range(len(tokens) - 1):
        fed = [each for each, count in agreed if count > at and at < len(each.rows)]
        first = [one for one in fed if not any(is_earlier_turn(other, one, at) for other in fed)]
        assert first, f"no request fed token {at} of {tokens}"
        found.append([one.rows[at] for one in first])
    return [*found, None]


def is_earlier_turn(other: Answer, one: Answer, at: int) -> bool:
    """Whether a request is a turn before another one, and fed the token at this position."""
    begins = len(other.prompt) < len(one.prompt) and one.prompt[: len(other.prompt)] == other.prompt
    return begins and agreement(other.tokens, one.prompt) > at


def agreement(one: list[int], other: list[int]) -> int:
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


@pytest.fixture
def on_a_cpu(monkeypatch):
    pytest.importorskip("aiohttp", reason="TRL's rollout process needs `pip install aiohttp`")
    without_gpu(monkeypatch.setattr)
    monkeypatch.setattr(async_grpo_trainer, "AsyncRolloutWorker", ThreadedWorker)
