"""Two processes, launched as users launch them, train on rollouts of a real vLLM.

In float32 an engine and a policy of the same weights agree, so what they differ by tells whether the weights came over
and whether each row is its own token's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cpu_engine
import pytest
from sharded.launching import KINDS, TRAIN, Case, Launch, Results, needs_deepspeed, of_config
from transformers import PreTrainedModel

pytestmark = pytest.mark.vllm

STEPS, UPDATES = 4, 2  # steps of a run, and those on each rollout


def cases(config: str, url: str) -> list[Case]:
    """What one launch of a config trains; the server is at a URL."""
    found = {f"server {config}": ["--rollouts", "server", "--url", url]}
    colocated = ["--rollouts", "colocate", "--checkpointing", "non-reentrant"]
    found[f"colocate {config}"] = colocated
    if config == "fsdp2":
        found["colocate adapters"] = [*colocated, "--lora"]
        if not cpu_engine.SECOND_RUNNER:
            found["tensor parallel"] = ["--rollouts", "colocate", "--tensor-parallel", 2]
    return [Case(name, TRAIN, options) for name, options in found.items()]


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model is and the runs write."""
    folder = tmp_path_factory.mktemp("sharded")
    cpu_engine.save_with_tokenizer(model, folder / "model")
    return folder


@pytest.fixture
def results(folder: Path, server_on_cpu: str) -> Iterator[Results]:
    """What each rank reports of a case, by its name."""
    yield Results(folder, {config: Launch(of_config(config), cases(config, server_on_cpu)) for config in KINDS})
    # vLLM ends the segments that two processes of an engine share in an exit handler, which a case does without
    for rank in range(2):
        Path(f"/dev/shm/-tp:0-[0-1]-cpushm_{rank}").unlink(missing_ok=True)


def assert_right(ranks: list[dict], config: str) -> None:
    assert [(each["processes"], each["kind"], each["wrong"]) for each in ranks] == [(2, KINDS[config], 0)] * 2
    assert all(report["compared"] > 0 for report in ranks)
    for log in (log for report in ranks for log in report["log"]):
        assert log["routing_replay/replayed_frac"] == 1 and log["routing_replay/missing_frac"] == 0
    log = ranks[0]["log"]
    assert len(log) == STEPS
    for first, second in zip(log[::UPDATES], log[1::UPDATES], strict=True):
        # by TRL's own measure, the engine samples from the weights that train, the updated ones too
        assert first["sampling/sampling_logp_difference/max"] < 1e-4
        assert first["routing_replay/changed_router_frac"] == 0 and first["routing_replay/agreement"] == 1
        assert second["routing_replay/changed_router_frac"] > 0.01, "live routes of the second update are others"


CONFIGS = ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)]


@pytest.mark.parametrize("config", CONFIGS)
def test_an_engine_in_each_process(results: Results, config: str) -> None:
    assert_right(results(f"colocate {config}"), config)


def test_an_engine_in_each_process_of_adapters(results: Results) -> None:
    assert_right(results("colocate adapters"), "fsdp2")


@pytest.mark.skipif(
    cpu_engine.SECOND_RUNNER, reason="vLLM 0.31 and later return no routes with tensor parallelism here"
)
def test_an_engine_over_two_processes(results: Results) -> None:
    assert_right(results("tensor parallel"), "fsdp2")


@pytest.mark.parametrize("config", CONFIGS)
def test_a_server(results: Results, config: str) -> None:
    assert_right(results(f"server {config}"), config)
