"""Runs on two processes, launched as users launch them: every row replays, and they learn what one process learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engines.fake_vllm import fake_vllm
from engines.tiny_chat import tiny_qwen3_moe
from safetensors.torch import load_file
from sharded.launching import HERE, KINDS, launch, needs_deepspeed, run
from transformers import Qwen3Config, Qwen3ForCausalLM

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the models are and the runs write."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny_qwen3_moe().save_pretrained(folder / "model")
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=2)).save_pretrained(
        folder / "dense"
    )
    return folder


def trained(folder: Path, name: str, lora: bool) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "trained" / ("adapter_model.safetensors" if lora else "model.safetensors"))


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def alone(request, folder):
    """Whether adapters train, and what one process makes of it."""
    lora = request.param
    (report,) = launch(folder, "single_gpu", f"alone{lora}", *["--lora"] * lora, processes=1)
    assert report["kind"] == "NO" and report["wrong"] == 0 < report["compared"]
    return lora, report, trained(folder, f"alone{lora}", lora)


def assert_replayed(report: dict, kind: str) -> None:
    assert (report["processes"], report["kind"]) == (2, kind)
    assert report["wrong"] == 0 < report["compared"]
    assert len(report["log"]) == STEPS
    for log in report["log"]:
        assert log["routing_replay/replayed_frac"] == 1 and log["routing_replay/missing_frac"] == 0


# Both ways to gate and all ways to checkpoint occur with full training, with adapters, and with each kind of shards.
RUNS = {
    "ddp": ("ddp", "MULTI_CPU", "none", "op"),
    "fsdp2": ("fsdp2", "FSDP", "none", "intercept"),
    "fsdp2 and op": ("fsdp2", "FSDP", "non-reentrant", "op"),
    "fsdp2 checkpoints": ("fsdp2_activation_checkpointing", "FSDP", "none", "intercept"),
    "zero2": ("zero2", "DEEPSPEED", "non-reentrant", "op"),
    "zero3": ("zero3", "DEEPSPEED", "none", "intercept"),
    "zero3 and op": ("zero3", "DEEPSPEED", "reentrant", "op"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_deepspeed if RUNS[n][1] == "DEEPSPEED" else ()) for n in RUNS]
)
def test_two_processes_learn_what_one_learns(folder, alone, name):
    lora, expected, weights = alone
    config, kind, checkpointing, gating = RUNS[name]
    options = ["--checkpointing", checkpointing, "--gating", gating, *["--lora"] * lora]
    ranks = launch(folder, config, f"{name} {lora}".replace(" ", "_"), *options)
    rows = [report["compared"] // report["calls"] for report in ranks]
    assert rows[0] != rows[1], "completions of equal lengths cannot show a mistake in counting"
    for report in ranks:
        assert_replayed(report, kind)
        for log, own in zip(report["log"], expected["log"], strict=True):
            assert log["routing_replay/changed_router_frac"] == own["routing_replay/changed_router_frac"] > 0.9
            for metric in ("loss", "grad_norm", "entropy"):
                assert log[metric] == pytest.approx(own[metric], rel=1e-5, abs=1e-6), metric
    start = load_file(folder / "model" / "model.safetensors")
    for key, value in trained(folder, f"{name} {lora}".replace(" ", "_"), lora).items():
        torch.testing.assert_close(value, weights[key], rtol=1e-5, atol=1e-5)
        assert lora or not key.endswith("o_proj.weight") or not torch.allclose(value, start[key], atol=1e-4)


@pytest.mark.parametrize("config", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_rollouts_of_a_server(folder, alone, config):
    """The main process asks for all, each process replays its own, and whole weights go to the server in between."""
    lora, expected, weights = alone
    with fake_vllm() as server:
        options = ["--rollouts", "mock", "--url", server.base_url, "--checkpointing", "non-reentrant"]
        options += ["--lora"] * lora
        ranks = launch(folder, config, f"{config}_server_{lora}", *options)
    for report in ranks:
        assert report["wrong"] == 0 < report["compared"]
        for log, own in zip(report["log"], expected["log"], strict=True):
            assert log["routing_replay/replayed_frac"] == 1
            for metric in ("loss", "grad_norm", "entropy"):
                assert log[metric] == pytest.approx(own[metric], rel=1e-5, abs=1e-6), metric
    shapes = {name: list(parameter.shape) for name, parameter in tiny_qwen3_moe().named_parameters()}
    assert [report["sent"] for report in ranks] == [[shapes] * (STEPS // 2), []]  # one process sends
    for key, value in trained(folder, f"{config}_server_{lora}", lora).items():
        torch.testing.assert_close(value, weights[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rollouts", ["own", "batching"])
@pytest.mark.parametrize("config", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_rollouts_of_the_policies_are_recorded_and_replayed(folder, config, rollouts):
    options = ["--rollouts", rollouts, "--checkpointing", "non-reentrant"]
    for report in launch(folder, config, f"{config}_{rollouts}", *options):
        assert_replayed(report, KINDS[config])
        # at the weights of the rollout live routing is the record; after an update it is not
        changed = [log["routing_replay/changed_router_frac"] for log in report["log"]]
        assert changed[0] == changed[2] == 0 and min(changed[1], changed[3]) > 0.1


@pytest.fixture(scope="module")
def alone_with_masks(folder):
    """What one process makes of told masks; they change what it learns."""
    (report,) = launch(folder, "single_gpu", "alone_masks", "--masks", processes=1)
    (without,) = launch(folder, "single_gpu", "alone_without", processes=1)
    for log, other in zip(report["log"], without["log"], strict=True):
        assert log["entropy"] < 0.9 * other["entropy"]
    return report, trained(folder, "alone_masks", lora=False)


@pytest.mark.parametrize("config", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_sampling_masks_with_a_head_that_is_sharded(folder, alone_with_masks, config):
    expected, weights = alone_with_masks
    for report in launch(folder, config, f"{config}_masks", "--masks", "--checkpointing", "non-reentrant"):
        for log, own in zip(report["log"], expected["log"], strict=True):
            for metric in ("loss", "grad_norm", "entropy"):
                assert log[metric] == pytest.approx(own[metric], rel=1e-5, abs=1e-6), metric
    for key, value in trained(folder, f"{config}_masks", lora=False).items():
        torch.testing.assert_close(value, weights[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_sampling_masks_of_sharded_policies(folder, config):
    """Recorded while sharded weights generate: on both sides the same distribution."""
    for report in launch(folder, config, f"{config}_own_masks", "--masks", "--rollouts", "own"):
        found = [log["sampling/k3_kl"] for log in report["log"] if log.get("sampling/k3_kl") is not None]
        assert found and max(found) <= 1e-10


def test_training_goes_on_with_shards(folder):
    """A second `train()` finds what the first one has sharded."""
    once, twice = launch(folder, "fsdp2", "once"), launch(folder, "fsdp2", "twice", "--twice")
    for one, two in zip(once, twice, strict=True):
        assert two["wrong"] == 0 and two["compared"] == 2 * one["compared"]
        assert len(two["log"]) == STEPS


@pytest.mark.parametrize("config", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_resumed(folder, config):

    options = ["--lora", "--optim", "adamw_torch"]  # PyTorch restores no optimizer that has no state
    straight = launch(folder, config, f"{config}_straight", *options, "--save-steps", "2")
    checkpoint = folder / f"{config}_straight" / "checkpoint-2"
    resumed = launch(folder, config, f"{config}_resumed", *options, "--resume", str(checkpoint))
    for one, other in zip(straight, resumed, strict=True):
        assert other["wrong"] == 0 < other["compared"] < one["compared"]
        assert [log["loss"] for log in other["log"][-2:]] == pytest.approx([log["loss"] for log in one["log"][-2:]])
    for name, value in trained(folder, f"{config}_straight", lora=True).items():
        torch.testing.assert_close(trained(folder, f"{config}_resumed", lora=True)[name], value, rtol=1e-5, atol=1e-6)


def told(folder: Path, config: str, name: str, *options: str) -> set[str]:
    with pytest.raises(FileNotFoundError):  # no rank has anything to report
        launch(folder, config, name, *options)
    return {(folder / f"{name}-rank{rank}.txt").read_text() for rank in range(2)}


def test_a_check_that_fails_on_one_process_fails_on_both(folder):
    assert told(folder, "fsdp2", "fails", "--fails-on", "1") == {"process 1: the check failed here"}


@needs_deepspeed
def test_a_dense_model_is_refused_whose_weights_are_sharded_at_once(folder):
    (text,) = told(folder, "zero3", "refused", "--dense")
    assert text.startswith("process 0: Qwen3ForCausalLM is a dense model")


def attached(folder: Path, script: str, gating: str, name: str) -> list[dict]:
    """What each rank reports of a script that attaches to sharded models."""
    run(["torch.distributed.run", "--standalone", "--nproc_per_node", 2, HERE / script, folder, gating], folder)
    return [json.loads((folder / f"{name}-{gating}-rank{rank}.json").read_text()) for rank in range(2)]


def assert_right(seen: dict) -> None:
    assert seen["live"] > 0.9 * seen["rows"] > 0, seen  # routes of nobody
    assert seen["wrong"] == 0, seen
    assert max(seen["logits"], seen["gradient"]) < 1e-5, seen


@pytest.mark.parametrize("gating", ["intercept", "op"])
def test_models_that_are_sharded_already(folder, gating):
    """By Transformers: tensors, experts, weights, and experts over weights."""
    for report in attached(folder, "attach_sharded.py", gating, "attached"):
        assert set(report) == {"tp", "ep and tp", "fsdp", "ep over fsdp"}
        for seen in report.values():
            assert_right(seen)


@needs_deepspeed
@pytest.mark.parametrize("gating", ["intercept", "op"])
def test_routers_that_zero3_has_partitioned(folder, gating):
    for seen in attached(folder, "attach_zero3.py", gating, "zero3"):
        assert seen["elements"] == 0, "the router is not partitioned"
        assert seen["forgotten"], "weights are fetched ahead by the order of the forwards that checked the routers"
        assert_right(seen)
