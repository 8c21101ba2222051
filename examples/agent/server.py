"""
A server for the asynchronous example: of vLLM's HTTP interface what TRL's AsyncGRPO asks for, on a CPU.

It samples from a model of this process, one request after the other, and returns the experts that each token went
through. With GPUs, `vllm serve` takes its place.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch

_ANSWERS = {
    "/health": {},
    "/version": {"version": "0.30.0"},
    "/server_info": {
        "vllm_config": {
            "model_config": {"enable_return_routed_experts": True, "logprobs_mode": "processed_logprobs"},
            "lora_config": None,
        }
    },
}


class Sampler:
    """
    Samples completions, and takes weights as a `weight_transfer` of TRL.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A Qwen3-MoE of its own, on the CPU.
    """

    def __init__(self, model: Any):
        self.model = model.eval()
        self._one_at_a_time = threading.Lock()
        self._selected: dict[int, torch.Tensor] = {}  # by layer: (T, K) of the last forward
        for index, layer in enumerate(model.model.layers):
            layer.mlp.gate.register_forward_hook(
                lambda module, args, output, index=index: self._selected.__setitem__(index, output[2])
            )

    @torch.no_grad()
    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer `/v1/completions`."""
        prompt, completion, logprobs, rows = request["prompt"], [], [], []
        with self._one_at_a_time:
            fed, cache = torch.tensor([prompt]), None
            while len(completion) < request["max_tokens"]:
                output = self.model(fed, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                rows.append(torch.stack([self._selected[layer] for layer in sorted(self._selected)], 1))
                of_next = (output.logits[0, -1] / request["temperature"]).log_softmax(-1)
                token = int(torch.multinomial(of_next.exp(), 1))
                completion.append(token)
                logprobs.append(float(of_next[token]))
                if token == self.model.config.eos_token_id:
                    break
                fed = torch.tensor([[token]])
        routes = torch.cat(rows)[request.get("routed_experts_prompt_start", 0) :]  # (T - 1, layers, K)
        file = io.BytesIO()
        np.save(file, routes.to(torch.uint8).numpy())
        choice = {
            "token_ids": completion,
            "logprobs": {"token_logprobs": logprobs},
            "routed_experts": base64.b64encode(file.getvalue()).decode(),
        }
        return {"choices": [choice]}

    def init_weight_transfer(self) -> None:
        """Nothing is to be opened."""

    def pause(self) -> None:
        """Wait for the request that runs, and let no other one begin."""
        self._one_at_a_time.acquire()

    def send_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Take the weights of the trainer."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in weights:
                own[name].copy_(weight)

    def resume(self) -> None:
        """Let requests begin."""
        self._one_at_a_time.release()

    def destroy(self) -> None:
        """Nothing is to be closed."""


@contextmanager
def serve(sampler: Sampler) -> Iterator[str]:
    """Answer on a free port for the length of the block, which gets the base URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.answer(_ANSWERS.get(self.path.partition("?")[0]))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(sampler.complete(body) if self.path == "/v1/completions" else None)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
