"""A tiny model, an oracle that shares no code with the package, and what a vLLM on a CPU needs.

Legend: T tokens of a sequence, R = T - 1 rows, D decoder layers, K experts per token.

How weights reach an engine is in `cpu_weights`.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_weights import compute_from_parameters
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# One thread: with two, the barriers of a tiny forward wait whole time slices as soon as another process runs.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # where a trainer and a server meet for weights
    "HF_HUB_OFFLINE": "1",
}
SECOND_RUNNER = find_spec("vllm") is not None and Version(version("vllm")) >= Version("0.31")
if SECOND_RUNNER:
    # routes come from the second model runner, whose Triton kernels run as Python here (install_vllm_cpu.sh)
    ENVIRONMENT["VLLM_USE_V2_MODEL_RUNNER"] = "1"
VOCAB_SIZE = 128
PAD, EOS = 0, 1

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,  # the CPU kernels want multiples of 32
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # the default gives nearly uniform routers, where rounding decides
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}


def tiny_qwen3_moe(num_experts: int = 8, seed: int = 0) -> PreTrainedModel:
    """A random Qwen3-MoE of 4 layers in float32, the second one dense."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(**_SIZES, num_experts=num_experts, moe_intermediate_size=32, mlp_only_layers=[1])
    return Qwen3MoeForCausalLM(config).eval()


def tiny_mixtral(num_experts: int = 8, seed: int = 0) -> PreTrainedModel:
    """A random Mixtral of 4 layers in float32."""
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=num_experts, sliding_window=None)).eval()


def save_with_tokenizer(model: PreTrainedModel, folder: Path) -> Path:
    """Write the model and a tokenizer whose words are `t3` to `t127`, separated by blanks."""
    vocab = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2} | {f"t{i}": i for i in range(3, VOCAB_SIZE)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def forward_routes(model: PreTrainedModel, tokens: Sequence[int]) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """
    What the routers of a Transformers model select, seen by plain hooks on modules that return (logits, weights, ids).

    Returns:
        `tuple[dict[int, torch.Tensor], torch.Tensor]`: Sorted ids `(T, K)` by decoder layer, and log-probs `(T, V)`.
    """
    routes: dict[int, torch.Tensor] = {}

    def record(layer: int) -> Callable[..., None]:
        return lambda module, args, output: routes.__setitem__(layer, output[2].sort(-1).values)

    handles = [
        layer.mlp.gate.register_forward_hook(record(i))
        for i, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "gate")
    ]
    try:
        logits = model(torch.tensor([list(tokens)])).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return routes, logits.log_softmax(-1)


def mismatches(model: PreTrainedModel, tokens: Sequence[int], ids: np.ndarray) -> tuple[int, int]:
    """
    Hold a record `(R, D, K)` against a Transformers forward over all tokens.

    Returns:
        `tuple[int, int]`: How many (position, MoE layer) pairs differ as sets, and how many there are.
    """
    routes, _ = forward_routes(model, tokens)
    assert ids.shape == (len(tokens) - 1, model.config.num_hidden_layers, model.config.num_experts_per_tok)
    recorded = torch.from_numpy(ids.astype(np.int64)).sort(-1).values
    pairs = [(recorded[:, layer] != live[:-1]).any(-1) for layer, live in routes.items()]
    return int(torch.stack(pairs).sum()), torch.stack(pairs).numel()


def distance(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int], sampled: Sequence[float]) -> float:
    """Largest distance of the sampled log-probs of a completion from those of a Transformers forward."""
    _, logprobs = forward_routes(model, [*prompt, *tokens])
    expected = logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(list(tokens))[:, None])[:, 0]
    return float((torch.tensor(list(sampled)) - expected).abs().max())


def logprob_difference(model: PreTrainedModel, prompt: Sequence[int], completion: Any) -> float:
    """The [`distance`] of a `CompletionOutput`."""
    sampled = [step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    return distance(model, prompt, completion.token_ids, sampled)


def cut_without_triton() -> None:
    """Let vLLM cut by top-k and top-p in PyTorch: its kernel takes loop counters for tensors, here they are ints."""
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False


def cpu_llm(*args: Any, **kwargs: Any) -> Any:
    """`vllm.LLM` for a CPU. In the place of `trl.generation.vllm_generation.LLM` it lets TRL's colocate mode run."""
    from vllm import LLM

    compute_from_parameters()
    if SECOND_RUNNER:
        cut_without_triton()
    return LLM(*args, **{"dtype": "float32", "enforce_eager": True, **kwargs})


def close(llm: Any) -> None:
    """Free the engine, so that the next one can start in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *args: 0)  # vLLM asks for several, each of which looks at all libraries
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
    gc.collect()
    gc.freeze()  # as `conftest.py` does, which vLLM has undone


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(model_folder: Path, log: Path, *extra: str, timeout: float = 300.0) -> Iterator[str]:
    """Run `vllm serve` on a free port of this machine for the length of the block, which gets its base URL."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model_folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "256", "--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    command += ["--enable-scale-out", "--worker-extension-cls", "server_worker.OnACPU", *extra]
    command += ["--weight-transfer-config", '{"backend": "nccl"}']
    python_path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": python_path}
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        base_url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(server, base_url, log, timeout)
        yield base_url
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_until_healthy(server: subprocess.Popen, base_url: str, log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return request(f"{base_url}/health")
        except urllib.error.URLError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text()[-3000:]
                raise RuntimeError(f"vllm serve is not up, exit status {server.returncode}:\n{tail}") from error
        time.sleep(0.5)


def routes_section(config: dict[str, Any]) -> dict[str, Any]:
    """Where a server's config says whether it returns routes: of its own from vLLM 0.31 on, of the model before."""
    return config["aux_output_config"] if "aux_output_config" in config else config["model_config"]


def request(url: str, body: Any = None) -> Any:
    """GET, or POST of JSON where there is a body; the answer's JSON, or `None` where it is empty."""
    text = read(url, body)
    return json.loads(text) if text else None


def read(url: str, body: Any = None) -> bytes:
    """GET, or POST of JSON where there is a body; the answer as it came."""
    data = None if body is None else json.dumps(body).encode()
    message = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(message, timeout=120) as response:
        return response.read()
