"""A small HTTP server that answers what TRL asks a vLLM server, with routes that tell whose they are."""

from __future__ import annotations

import base64
import io
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

LAYERS, EXPERTS, TOP_K = 4, 16, 4
CAPTURES = {"enable_return_routed_experts": True, "logprobs_mode": "processed_logprobs", "max_logprobs": -1}
MASKS = {"return_sampling_mask": True, "logprobs_mode": "processed_logprobs", "max_logprobs": -1}
MASKS_PATH = "/inference/v1/generate"


def completion_of(prompt: list[int], index: int) -> list[int]:
    """What the server makes of a prompt: its length and tokens say which of the n completions it is."""
    return [10 + (prompt[0] + index + i) % 100 for i in range(1 + (prompt[0] + index) % 5)]


def routes_of(tokens: list[int]) -> np.ndarray:
    """(T - 1, D, K) of `uint8`, one row per input token, told by the token and its position."""
    rows, layers = np.arange(len(tokens) - 1)[:, None], np.arange(LAYERS)
    first = np.array(tokens[:-1])[:, None] + 3 * rows + 5 * layers
    return ((first[:, :, None] + np.arange(TOP_K)) % EXPERTS).astype(np.uint8)


def kept_of(tokens: list[int]) -> list[list[int]]:
    """What the server kept of the vocabulary, a list a token: told by the token and its position."""
    return [
        sorted({token, *((token + 7 * i + 11 * j) % 128 for j in range(1 + i % 4))}) for i, token in enumerate(tokens)
    ]


def npy_base64(ids: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, ids)
    return base64.b64encode(file.getvalue()).decode()


@dataclass
class FakeVLLM:
    """How the server behaves, and what it was asked."""

    version: str = "0.30.0"
    info: dict[str, Any] = field(default_factory=lambda: {"model_config": dict(CAPTURES)})
    returns_routes: bool = True
    returns_masks: bool = True
    scale_out: bool = True  # whether the endpoint that returns masks is there
    leaves_out: bool = True  # rows before `routed_experts_prompt_start`
    failures: list[int] = field(default_factory=list)  # HTTP statuses of the next completions
    longest_delay: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    base_url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        choices = []
        for prompt in prompts:
            for index in range(body["n"]):
                tokens = completion_of(prompt, index)
                named = [f"token_id:{token}" for token in tokens]
                routes = routes_of([*prompt, *tokens])
                if self.leaves_out:
                    routes = routes[body.get("routed_experts_prompt_start", 0) :]
                logprobs = [-0.5 - 0.01 * token for token in tokens]
                choices.append(
                    {
                        "index": len(choices),
                        "prompt_token_ids": prompt,
                        "token_ids": tokens,
                        "logprobs": {
                            "tokens": named,
                            "token_logprobs": logprobs,
                            "top_logprobs": [{name: value} for name, value in zip(named, logprobs, strict=True)],
                        },
                        "routed_experts": npy_base64(routes) if self.returns_routes else None,
                    }
                )
        return {"choices": choices}

    def complete_tokens(self, body: dict[str, Any]) -> dict[str, Any]:
        """Tokens in, tokens out: the endpoint with masks. Log-probabilities look like those of a chat."""
        answer = self.complete({**body["sampling_params"], "prompt": body["token_ids"]})
        for choice in answer["choices"]:
            of_token = zip(choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"], strict=True)
            content = [{"token": name, "logprob": value, "top_logprobs": []} for name, value in of_token]
            if self.version >= "0.32":
                for entry in content:
                    entry["token_id"] = int(entry.pop("token").removeprefix("token_id:"))
            choice["logprobs"] = {"content": content}
            choice["sampling_mask"] = kept_of(choice["token_ids"]) if self.returns_masks else None
            del choice["prompt_token_ids"]
        return answer


@contextmanager
def fake_vllm(**behaviour: Any) -> Iterator[FakeVLLM]:
    """Run the server for the length of the block."""
    with serving(FakeVLLM(**behaviour)) as fake:
        yield fake


@contextmanager
def serving(fake: FakeVLLM) -> Iterator[FakeVLLM]:
    """Let it answer for the length of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, body: Any, status: int = 200) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            fake.paths.append(self.path)
            answers = {
                "/health": {},
                "/version": {"version": fake.version},
                "/v1/models": {"data": [{"id": "org/model", "max_model_len": 128}]},
                "/server_info": {"vllm_config": fake.info},
            }
            wrong_method = path == MASKS_PATH and fake.scale_out
            self.answer(answers.get(path, {}), 200 if path in answers else 405 if wrong_method else 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
            fake.paths.append(self.path)
            complete = {"/v1/completions": fake.complete, MASKS_PATH: fake.complete_tokens}.get(self.path)
            if complete is None:
                return self.answer({})
            with fake.lock:
                fake.requests.append(body)
                fake.at_once += 1
                fake.most_at_once = max(fake.most_at_once, fake.at_once)
                failure = fake.failures.pop() if fake.failures else None
            time.sleep(random.uniform(0, fake.longest_delay))
            with fake.lock:
                fake.at_once -= 1
            return self.answer({"error": "busy"}, failure) if failure else self.answer(complete(body))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    fake.base_url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
