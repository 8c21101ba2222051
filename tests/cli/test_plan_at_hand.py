"""`trl-r3 plan`: configs that come with the package, a reference model, and what loading takes."""

import json

import pytest

from trl_r3.cli import command as cli
from trl_r3.cli.plan.config_at_hand import SHIPPED, config_at_hand
from trl_r3.cli.plan.job import Job
from trl_r3.cli.plan.memory import estimate
from trl_r3.cli.plan.remedies import remedies
from trl_r3.cli.plan.sizes import read_model

QWEN = str(SHIPPED / "qwen3-30b-a3b")


@pytest.fixture(scope="module")
def qwen():
    return read_model(QWEN, Job(prompts=1))


@pytest.fixture
def asked(monkeypatch):
    """What the Hub was asked, which cannot be reached."""
    asked = []

    def unreachable(url, timeout):
        asked.append((url, timeout))
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    return asked


@pytest.mark.parametrize("name", ["Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B-Instruct-2507", QWEN])
def test_a_config_of_the_package_serves_at_once(asked, monkeypatch, name):
    """That of this very checkpoint, after one question without retries."""
    is_shipped = name == "Qwen/Qwen3-30B-A3B"
    assert config_at_hand(name) == (QWEN if is_shipped else name)
    assert [timeout for _, timeout in asked] == [3.0] * is_shipped
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, timeout: None)
    assert config_at_hand(name) == name, "the Hub gives one"


def test_every_config_of_the_package_is_found(asked):
    named = [json.loads(path.read_text())["_source"].split()[4].rstrip(",") for path in SHIPPED.glob("*/config.json")]
    assert len(named) == 15 and all(config_at_hand(name) != name for name in named)


@pytest.mark.parametrize(
    ("strategy", "a_gpu", "gathered", "a_host"),
    [
        ("ddp", 2, 0, 4 * (2 + 2)),
        ("fsdp2", 2 / 4, 2, 4 * (4 + 2)),  # TRL shards it as one, so all of it comes together
        ("zero2", 2, 0, 4 * (2 + 2)),
        ("zero3", 2 / 4, None, 2),
    ],
)
def test_a_reference_model_counts(qwen, strategy, a_gpu, gathered, a_host):
    """In bytes a parameter; with adapters the base is the reference."""
    settings = {"prompts": 1, "gpus": 4, "strategy": strategy}
    without, plan = (estimate(qwen, Job(**settings, beta=beta)) for beta in (0.0, 0.04))
    assert (without.reference, plan.reference) == (0, pytest.approx(a_gpu * qwen.parameters))
    assert plan.gathered == (without.gathered if gathered is None else gathered * qwen.parameters)
    assert plan.gpu - without.gpu == pytest.approx(plan.reference + plan.gathered - without.gathered)
    assert plan.loading == a_host * qwen.parameters
    assert estimate(qwen, Job(**settings, beta=0.04, lora_rank=4)).reference == 0


def test_going_without_a_reference_is_a_remedy(qwen):
    job = Job(prompts=1, gpus=8, strategy="fsdp2", beta=0.04)
    assert not estimate(qwen, job).fits
    assert remedies(qwen, job)[0].change == "train without a reference model (`--beta 0`)"


def test_what_is_left_and_what_loading_takes(qwen, capsys):
    """One process loads onto its GPU; a host that is too small for several is told what to set."""
    assert estimate(qwen, Job(prompts=1)).loading == 0
    options = ["--gpus", "8", "--strategy", "fsdp2", "--prompts", "2"]
    assert cli.main(["plan", "--model", QWEN, *options]) == 0
    printed = capsys.readouterr().out
    assert "It fits if one process loads: 16.4 GB of each GPU are left for activations and logits." in printed
    assert "8 processes hold 977.0 GB of weights in the 512.0 GB of a host" in printed
    assert cli.main(["plan", "--model", QWEN, *options, "--host-memory", "1000"]) == 0
    printed = capsys.readouterr().out
    assert "processes hold" not in printed and "It fits: 16.4 GB" in printed
    assert "for its cache" not in printed
    shared = ["--lora-rank", "8", "--engine-share", "0.3", "--engine-tensor-parallel", "4"]
    assert cli.main(["plan", "--model", QWEN, *options, *shared]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "for its cache" in line)
    assert "8.7 GB" in row, "24 GB less a quarter of 61.1 GB"
