"""What tests of engines share: a vLLM server, and models that route by token."""

from __future__ import annotations

import pytest
from datasets import Dataset
from engines.tiny_chat import make_trainer
from token_oracle import rollout, training
from trl.generation import vllm_client, vllm_generation

from trl_r3.trainers import construction

__all__ = ["rollout", "training"]  # fixtures


@pytest.fixture
def installed(monkeypatch):
    """TRL's client asks whether vLLM is installed; only a server is needed here."""
    pytest.importorskip("requests", reason="TRL's client of a vLLM server needs `pip install requests`")
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda *args, **kwargs: True)


@pytest.fixture
def weightless(installed, monkeypatch):
    """Trainers may roll out on a server; weights go nowhere."""
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(construction, "is_vllm_available", lambda *args, **kwargs: True)
    for name in ("init_communicator", "close_communicator", "update_named_params"):
        monkeypatch.setattr(vllm_client.VLLMClient, name, lambda *args, **kwargs: None)


@pytest.fixture
def server_trainer(weightless, tmp_path):
    """A trainer that rolls out on a server."""

    def make(fake, **settings):
        prompts = Dataset.from_dict({"prompt": ["t30 t31 t32", "t40", "t50 t51 t52 t53", "t60 t61"]})
        settings = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": fake.base_url, **settings}
        return make_trainer(tmp_path, prompts, per_device_train_batch_size=8, **settings)

    return make
