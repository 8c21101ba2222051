"""Runs on two processes, launched as users launch them: every row replays, and they learn what one process learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines.tiny_chat import tiny_qwen3_moe
from safetensors.torch import load_file
from sharded.cases import RUNS, WAYS
from sharded.launching import CONFIGS, KINDS, needs_deepspeed
from sharded.train_biased import bias_of, biased_deepseek

STEPS = 4


def trained(folder: Path, name: str, way: str) -> dict[str, torch.Tensor]:
    file = "adapter_model.safetensors" if way == "lora" else "model.safetensors"
    return load_file(folder / name / "trained" / file)


@pytest.fixture(scope="module", params=WAYS)
def alone(request, folder, results):
    """How it trains, and what one process makes of it."""
    way = request.param
    (report,) = results(f"alone {way}")
    assert report["kind"] == "NO" and report["wrong"] == 0 < report["compared"]
    return way, report, trained(folder, f"alone {way}", way)


def assert_replayed(report: dict, kind: str) -> None:
    assert (report["processes"], report["kind"]) == (2, kind)
    assert report["wrong"] == 0 < report["compared"]
    assert len(report["log"]) == STEPS
    for log in report["log"]:
        assert log["routing_replay/replayed_frac"] == 1 and log["routing_replay/missing_frac"] == 0


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_deepspeed if RUNS[n][1] == "DEEPSPEED" else ()) for n in RUNS]
)
def test_two_processes_learn_what_one_learns(folder, results, alone, name):
    way, expected, weights = alone
    _, kind, *_ = RUNS[name]
    ranks = results(f"{name} {way}")
    rows = [report["compared"] // report["calls"] for report in ranks]
    assert rows[0] != rows[1], "completions of equal lengths cannot show a mistake in counting"
    for report in ranks:
        assert_replayed(report, kind)
        for log, own in zip(report["log"], expected["log"], strict=True):
            assert log["routing_replay/changed_router_frac"] == own["routing_replay/changed_router_frac"] > 0.9
            for metric in ("loss", "grad_norm", "entropy"):
                assert log[metric] == pytest.approx(own[metric], rel=1e-5, abs=1e-6), metric
    start = load_file(folder / "model" / "model.safetensors")
    for key, value in trained(folder, f"{name} {way}", way).items():
        torch.testing.assert_close(value, weights[key], rtol=1e-5, atol=1e-5)
        assert way == "lora" or not key.endswith("o_proj.weight") or not torch.allclose(value, start[key], atol=1e-4)


@pytest.mark.parametrize("config", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_rollouts_of_a_server(folder, results, alone, config):
    """The main process asks for all, each process replays its own, and whole weights go to the server in between."""
    way, expected, weights = alone
    ranks = results(f"{config} server {way}")
    for report in ranks:
        assert report["wrong"] == 0 < report["compared"]
        for log, own in zip(report["log"], expected["log"], strict=True):
            assert log["routing_replay/replayed_frac"] == 1
            for metric in ("loss", "grad_norm", "entropy"):
                assert log[metric] == pytest.approx(own[metric], rel=1e-5, abs=1e-6), metric
    shapes = {name: list(parameter.shape) for name, parameter in tiny_qwen3_moe().named_parameters()}
    assert [report["sent"] for report in ranks] == [[shapes] * (STEPS // 2), []]  # one process sends
    for key, value in trained(folder, f"{config} server {way}", way).items():
        torch.testing.assert_close(value, weights[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_without_padding_they_learn_the_same(folder, results, alone, config):
    """Each process has as much work as its sequences have tokens."""
    way, expected, weights = alone
    ranks = results(f"{config} unpadded {way}")
    assert all(report["skipped"] > 0 for report in ranks)
    for report in ranks:
        assert_replayed(report, KINDS[config])
        for log, own in zip(report["log"], expected["log"], strict=True):
            for metric in ("loss", "grad_norm", "entropy"):
                assert log[metric] == pytest.approx(own[metric], rel=1e-4, abs=1e-5), metric
    for key, value in trained(folder, f"{config} unpadded {way}", way).items():
        torch.testing.assert_close(value, weights[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rollouts", ["own", "batching"])
@pytest.mark.parametrize("config", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_rollouts_of_the_policies_are_recorded_and_replayed(results, config, rollouts):
    for report in results(f"{config} {rollouts}"):
        assert_replayed(report, KINDS[config])
        # at the weights of the rollout live routing is the record; after an update it is not
        changed = [log["routing_replay/changed_router_frac"] for log in report["log"]]
        assert changed[0] == changed[2] == 0 and min(changed[1], changed[3]) > 0.1


@pytest.fixture(scope="module")
def alone_with_masks(folder, results):
    """What one process makes of told masks; they change what it learns."""
    (report,), (without,) = results("alone masks"), results("alone without")
    for log, other in zip(report["log"], without["log"], strict=True):
        assert log["entropy"] < 0.9 * other["entropy"]
    return report, trained(folder, "alone masks", "full")


@pytest.mark.parametrize("config", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_sampling_masks_with_a_head_that_is_sharded(folder, results, alone_with_masks, config):
    expected, weights = alone_with_masks
    for report in results(f"{config} masks"):
        for log, own in zip(report["log"], expected["log"], strict=True):
            for metric in ("loss", "grad_norm", "entropy"):
                assert log[metric] == pytest.approx(own[metric], rel=1e-5, abs=1e-6), metric
    for key, value in trained(folder, f"{config} masks", "full").items():
        torch.testing.assert_close(value, weights[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_sampling_masks_of_sharded_policies(results, config):
    """Recorded while sharded weights generate: on both sides the same distribution."""
    for report in results(f"{config} own masks"):
        found = [log["sampling/k3_kl"] for log in report["log"] if log.get("sampling/k3_kl") is not None]
        assert found and max(found) <= 1e-10


@pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("fsdp2*.yaml")))
def test_routers_with_a_selection_bias(results, config):
    """Buffers are no weights that FSDP2 shards: each process has all of it."""
    expected = bias_of(biased_deepseek()).tolist()
    for report in results(f"{config} biased"):
        assert (report["kind"], report["steps"], report["replayed"]) == ("FSDP", 1, 1)
        assert report["bias"] == expected and len(set(expected)) == 8


def test_training_goes_on_with_shards(results):
    """A second `train()` finds what the first one has sharded."""
    once, twice = results("once"), results("twice")
    for one, two in zip(once, twice, strict=True):
        assert two["wrong"] == 0 and two["compared"] == 2 * one["compared"]
        assert len(two["log"]) == STEPS


@pytest.mark.parametrize("config", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_resumed(folder, results, config):
    straight, resumed = results(f"{config} straight"), results(f"{config} resumed")
    for one, other in zip(straight, resumed, strict=True):
        assert other["wrong"] == 0 < other["compared"] < one["compared"]
        assert [log["loss"] for log in other["log"][-2:]] == pytest.approx([log["loss"] for log in one["log"][-2:]])
    for name, value in trained(folder, f"{config} straight", "lora").items():
        torch.testing.assert_close(trained(folder, f"{config} resumed", "lora")[name], value, rtol=1e-5, atol=1e-6)


def refusals(ranks: list[dict]) -> set[str]:
    assert all(set(report) == {"refused"} for report in ranks), "no rank has anything else to report"
    return {report["refused"] for report in ranks}


def test_a_check_that_fails_on_one_process_fails_on_both(results):
    assert refusals(results("fails")) == {"process 1: the check failed here"}


@needs_deepspeed
def test_a_dense_model_is_refused_whose_weights_are_sharded_at_once(results):
    (text,) = refusals(results("refused"))
    assert text.startswith("process 0: Qwen3ForCausalLM is a dense model")


def assert_right(seen: dict) -> None:
    assert seen["live"] > 0.9 * seen["rows"] > 0, seen  # routes of nobody
    assert seen["wrong"] == 0, seen
    assert max(seen["logits"], seen["gradient"]) < 1e-5, seen


@pytest.mark.parametrize("gating", ["intercept", "op"])
def test_models_that_are_sharded_already(results, gating):
    """By Transformers: tensors, experts, weights, and experts over weights."""
    for report in results(f"attached {gating}"):
        assert set(report) == {"tp", "ep and tp", "fsdp", "ep over fsdp"}
        for seen in report.values():
            assert_right(seen)


@needs_deepspeed
@pytest.mark.parametrize("gating", ["intercept", "op"])
def test_routers_that_zero3_has_partitioned(results, gating):
    for seen in results(f"partitioned {gating}"):
        assert seen["elements"] == 0, "the router is not partitioned"
        assert seen["forgotten"], "weights are fetched ahead by the order of the forwards that checked the routers"
        assert_right(seen)
