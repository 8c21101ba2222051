"""
What vLLM refuses together with routes, in its own words: the cells of the table in benchmarks/vllm_versions.md.

It refuses when an engine is configured, before any weight is loaded, so these need no device that a setting is for.
"""

from __future__ import annotations

from typing import Any

import pytest
from cpu_engine import SECOND_RUNNER

from trl_r3.engines.vllm_versions import vllm_engine_kwargs

pytestmark = pytest.mark.vllm

NO_CONNECTOR = r"incompatible with KV connectors \(PD disaggregation, KV cache offload\)"
EXTERNAL_KV = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


def configure(folder: Any, **settings: Any) -> Any:
    """The config of an engine that returns routes."""
    from vllm import __version__
    from vllm.engine.arg_utils import EngineArgs

    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, **vllm_engine_kwargs(__version__)}
    return EngineArgs(str(folder), **{**defaults, **settings}).create_engine_config()


def refuses(folder: Any, words: str, **settings: Any) -> None:
    with pytest.raises(ValueError, match=words):
        configure(folder, **settings)


def test_what_the_tests_run_is_configured(model_folder):
    """Or the refusals below could be those of another setting."""
    configure(model_folder)
    configure(model_folder, tensor_parallel_size=2, distributed_executor_backend="external_launcher")


@pytest.mark.parametrize("connector", ["NixlConnector", "MooncakeConnector"])
def test_disaggregation(model_folder, connector):
    transfer = {"kv_connector": connector, "kv_role": "kv_producer"}
    words = f"incompatible with {connector}; PD auxiliary output is not supported" if SECOND_RUNNER else NO_CONNECTOR
    refuses(model_folder, words, kv_transfer_config=transfer)


def test_external_kv(model_folder):
    if SECOND_RUNNER:  # it keeps routes by the hash of a block, and fails where it has none
        config = configure(model_folder, kv_transfer_config=EXTERNAL_KV)
        assert config.kv_transfer_config.is_kv_transfer_instance
    else:
        refuses(model_folder, NO_CONNECTOR, kv_transfer_config=EXTERNAL_KV)


def test_prefix_caching_that_is_off(model_folder):
    if SECOND_RUNNER:
        refuses(model_folder, "AuxOutput Connector requires prefix caching", enable_prefix_caching=False)
    else:
        assert not configure(model_folder, enable_prefix_caching=False).cache_config.enable_prefix_caching


def test_the_first_model_runner(model_folder, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    if SECOND_RUNNER:
        refuses(model_folder, "AuxOutput Connector requires Model Runner V2; set VLLM_USE_V2_MODEL_RUNNER=1")
    else:
        assert configure(model_folder).model_config.enable_return_routed_experts


def test_pipeline_and_context_parallelism(model_folder):
    refuses(model_folder, r"incompatible with pipeline parallelism \(PP > 1\)", pipeline_parallel_size=2)
    refuses(
        model_folder, "incompatible with context parallelism", tensor_parallel_size=4, decode_context_parallel_size=2
    )


def test_expert_load_balancing_on_a_cpu(model_folder):
    """With or without routes. On a GPU ids are captured before the balancing maps them, which was read and not run."""
    words = "Expert parallelism load balancing is only supported on CUDA devices"
    for routes in (True, False):
        refuses(
            model_folder,
            words,
            enable_return_routed_experts=routes,
            enable_eplb=True,
            enable_expert_parallel=True,
            tensor_parallel_size=2,
        )


def test_fused_kernels_that_tell_no_ids(monkeypatch):
    """A kernel that routes inside itself, and has no way out for the ids, is refused when the capture is attached."""
    from types import SimpleNamespace

    import torch
    from vllm.model_executor.layers.fused_moe import layer
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import bind_routed_experts_capturer

    runner = layer.MoERunner.__new__(layer.MoERunner)
    torch.nn.Module.__init__(runner)
    runner.layer_name = "model.layers.0.mlp.experts"
    fused = SimpleNamespace(is_monolithic=True, moe_kernel=None)
    monkeypatch.setattr(layer.MoERunner, "_quant_method", fused)
    with pytest.raises(ValueError, match="Routed-experts capture is not supported with monolithic MoE kernel"):
        bind_routed_experts_capturer(torch.nn.ModuleList([runner]), SimpleNamespace(capture=print))
