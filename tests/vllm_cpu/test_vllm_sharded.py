"""Two processes, launched as users launch them, train on rollouts of a real vLLM.

In float32 an engine and a policy of the same weights agree, so what they differ by tells whether the weights came over
and whether each row is its own token's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cpu_engine
import pytest
from sharded.launching import KINDS, launch, needs_deepspeed
from transformers import PreTrainedModel

pytestmark = pytest.mark.vllm

STEPS, UPDATES = 4, 2  # steps of a run, and those on each rollout


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model is and the runs write."""
    folder = tmp_path_factory.mktemp("sharded")
    cpu_engine.save_with_tokenizer(model, folder / "model")
    return folder


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


@pytest.mark.parametrize(
    "config, lora",
    [("ddp", False), ("fsdp2", False), ("fsdp2", True), pytest.param("zero3", False, marks=needs_deepspeed)],
)
def test_an_engine_in_each_process(folder: Path, config: str, lora: bool) -> None:
    options = ["--rollouts", "colocate", "--checkpointing", "non-reentrant", *["--lora"] * lora]
    assert_right(launch(folder, config, f"colocate_{config}_{lora}", *options), config)


@pytest.fixture
def shared_memory() -> Iterator[None]:
    """The segments that two processes of an engine share, whose name is always the same, are gone afterwards."""
    yield
    for rank in range(2):  # vLLM does so in an exit handler, which the script does without
        Path(f"/dev/shm/-tp:0-[0-1]-cpushm_{rank}").unlink(missing_ok=True)


@pytest.mark.skipif(
    cpu_engine.SECOND_RUNNER, reason="vLLM 0.31 and later return no routes with tensor parallelism here"
)
def test_an_engine_over_two_processes(folder: Path, shared_memory: None) -> None:
    assert_right(launch(folder, "fsdp2", "tensor_parallel", "--rollouts", "colocate", "--tensor-parallel", 2), "fsdp2")


@pytest.mark.parametrize("config", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_a_server(folder: Path, server_on_cpu: str, config: str) -> None:
    options = ["--rollouts", "server", "--url", server_on_cpu]
    assert_right(launch(folder, config, f"server_{config}", *options), config)
