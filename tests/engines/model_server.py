"""A server whose answers a tiny model samples, through experts that no trainer would choose, and a log of them.

Its routers add noise to what they select by, not to what they weigh with: the noise of the server, and more for each
request. So live routing of a trainer with the same weights is another, and a replay of the rows is exactly the
server's forward.

Legend: T tokens of prompt and completion, D decoder layers, E experts, K experts per token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from engines.fake_vllm import FakeVLLM, npy_base64
from engines.tiny_chat import VOCAB
from transformers import PreTrainedModel


@dataclass
class Answer:
    """One request, as the server saw it."""

    prompt: list[int]
    completion: list[int]
    rows: np.ndarray  # (T - 1, D, K)
    updates: tuple[int, int]  # of the weights, when it began and when it ended

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.completion]


def noisy_router(self, hidden):
    """The router of Qwen3-MoE, which selects by noisy scores and weighs by its own."""
    hidden = hidden.reshape(-1, hidden.shape[-1])
    logits = F.linear(hidden, self.weight)
    ids = (logits + self.noise_E).topk(self.top_k).indices
    self.selected_TK = ids
    weights = logits.softmax(-1).gather(1, ids)
    return logits, weights / weights.sum(-1, keepdim=True) if self.norm_topk_prob else weights, ids


@dataclass
class ModelServer(FakeVLLM):
    """How it samples, and what it has answered."""

    model: PreTrainedModel | None = None
    noise: float = 0.5
    request_noise: float = 0.2
    script: Callable[[list[int]], list[int] | None] = lambda prompt: None  # a completion that is not sampled
    answers: list[Answer] = field(default_factory=list)
    updates: int = 0
    spoil: Callable[[np.ndarray], np.ndarray | None] = lambda rows: rows
    sampling: threading.RLock = field(default_factory=threading.RLock)
    running: threading.Event = field(default_factory=threading.Event)

    def start(self, model: PreTrainedModel, **behaviour: Any) -> None:
        """Begin again with another model."""
        self.model, self.answers, self.updates = model.eval().requires_grad_(False), [], 0
        model.set_experts_implementation("batched_mm")  # the fastest for so few tokens
        defaults = ModelServer()
        for name in ("noise", "request_noise", "script", "spoil", "returns_routes", "leaves_out", "info"):
            setattr(self, name, behaviour.get(name, getattr(defaults, name)))
        generator = torch.Generator().manual_seed(0)
        for gate in self._gates.values():
            gate.own_noise_E = torch.randn(len(gate.weight), generator=generator)
            gate.__class__ = type("NoisyRouter", (type(gate),), {"forward": noisy_router})
        self.draws = torch.Generator().manual_seed(1)
        # words and ends only: tools are called where a script says so, or turns could not be told apart afterwards
        words = [token for word, token in VOCAB.items() if word[0] == "t" or word == "<eos>"]
        self.said = torch.zeros(model.config.vocab_size).index_fill_(0, torch.tensor(words), 1.0)
        self.running.set()

    @property
    def _gates(self) -> dict[int, Any]:
        return {i: layer.mlp.gate for i, layer in enumerate(self.model.model.layers) if hasattr(layer.mlp, "gate")}

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        with self.sampling:
            began, seed = self.updates, int(torch.randint(2**31, (), generator=self.draws))
        noise = {}
        generator = torch.Generator().manual_seed(seed)
        for layer, gate in self._gates.items():
            more = torch.randn(len(gate.weight), generator=generator)
            noise[layer] = self.noise * gate.own_noise_E + self.request_noise * more
        scripted, completion, logprobs = self.script(prompt), [], []
        while len(completion) < body["max_tokens"]:
            self.running.wait()  # paused while weights come
            with self.sampling:
                logits, rows = self._forward([*prompt, *completion], noise)
            of_next = (logits[-1] / body["temperature"]).log_softmax(-1)
            drawn = of_next.exp() * self.said
            sampled = int(torch.multinomial(drawn, 1, generator=generator))
            token = scripted[len(completion)] if scripted else sampled
            completion.append(token)
            logprobs.append(float(of_next[token]))
            if token == self.model.config.eos_token_id or (scripted and len(completion) == len(scripted)):
                break
        with self.sampling:
            # a request that was preempted has the routes of its last prefill: those of the present weights
            _, rows = self._forward([*prompt, *completion], noise)
            answer = Answer(prompt, completion, rows[:-1], (began, self.updates))
            self.answers.append(answer)
        start = body.get("routed_experts_prompt_start", 0) if self.leaves_out else 0
        told = self.spoil(answer.rows) if self.returns_routes else None
        return {
            "choices": [
                {
                    "token_ids": completion,
                    "logprobs": {"token_logprobs": logprobs},
                    "routed_experts": None if told is None else npy_base64(told[start:]),
                }
            ]
        }

    def _forward(self, tokens: list[int], noise: dict[int, torch.Tensor]) -> tuple[torch.Tensor, np.ndarray]:
        for layer, gate in self._gates.items():
            gate.noise_E = noise[layer]
        logits = self.model(torch.tensor([tokens]), use_cache=False).logits[0]
        size = (len(tokens), self.model.config.num_hidden_layers, self.model.config.num_experts_per_tok)
        rows = np.zeros(size, dtype=np.uint8 if self.model.config.num_experts <= 256 else np.int16)
        for layer, gate in self._gates.items():
            rows[:, layer] = gate.selected_TK.numpy()
        return logits, rows


class CopiedWeights:
    """A transfer of weights for TRL's `weight_transfer`: from one model of this process to the other."""

    def __init__(self, server: ModelServer):
        self.server, self.sent = server, 0

    def init_weight_transfer(self) -> None:
        pass

    def pause(self) -> None:
        self.server.running.clear()

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        with self.server.sampling, torch.no_grad():
            own = dict(self.server.model.named_parameters())
            names = set()
            for name, weight in iterator:
                own[name].copy_(weight)
                names.add(name)
            assert names == set(own) - {"lm_head.weight"} | (names & {"lm_head.weight"})
            self.server.updates += 1
            self.sent += 1

    def resume(self) -> None:
        self.server.running.set()

    def destroy(self) -> None:
        self.server.running.set()
