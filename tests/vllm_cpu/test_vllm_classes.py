"""What the page of checkpoints says of vLLM, for some of its types."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
import vllm_classes

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def groups_end_with_the_test() -> Iterator[None]:
    """Else whoever trains in this process afterwards finds a process group."""
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def found_before(model_type: str) -> dict:
    from vllm import __version__

    results = json.loads(vllm_classes.RESULTS.read_text())
    if __version__ not in results:
        pytest.skip(f"the page has no vLLM {__version__}: `python tests/vllm_cpu/vllm_classes.py --run` adds it")
    return results[__version__][model_type]


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_the_page_says_what_the_class_does(model_type):
    found = vllm_classes.examine(vllm_classes.text_model(model_type))
    assert found.items() <= found_before(model_type).items()


@pytest.mark.parametrize("model_type", ["gemma4_text", "glm4_moe"])
def test_the_engine_returns_the_routes_of_transformers(model_type):
    found = found_before(model_type)
    if "rows_that_differ" not in found:
        pytest.skip("the page says of this vLLM only to what its capture attaches")
    wrong, pairs = vllm_classes.rows_that_differ(model_type)
    assert wrong == 0 and pairs > 80
    assert found["rows_that_differ"] == [wrong, pairs]


def test_experts_that_are_not_written_are_seen(tmp_path):
    """A class that skips what it does not know, without an error."""
    model = vllm_classes.text_model("qwen3_moe")
    vllm_model, config = vllm_classes.build(model, tmp_path)
    assert vllm_classes.sync(model, vllm_model, config, tmp_path) == "yes"
    load_weights = vllm_model.load_weights

    def without_experts(weights: list[tuple[str, torch.Tensor]]) -> set[str]:
        sent_by_trl = len(weights) == 1
        return load_weights([(name, value) for name, value in weights if not (sent_by_trl and "experts" in name)])

    vllm_model.load_weights = without_experts
    assert vllm_classes.sync(model, vllm_model, config, tmp_path) == "lost"
