"""`trl-r3 verify` started by `accelerate launch`: weights sharded as in training, one report of all processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engines.tiny_chat import tiny_qwen3_moe
from peft import LoraConfig, get_peft_model
from sharded.launching import CONFIGS, HERE, accelerate_launch, needs_deepspeed, start

# as users of Transformers have it; the threshold lets DeepSpeed partition weights as small as these
ZERO3 = {
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, an adapter of it that says something, and DeepSpeed's settings."""
    folder = tmp_path_factory.mktemp("launched")
    tiny_qwen3_moe().save_pretrained(folder / "model")
    base = tiny_qwen3_moe()
    base.name_or_path = str(folder / "model")
    adapter = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapter.save_pretrained(folder / "adapter")
    (folder / "zero3.json").write_text(json.dumps(ZERO3))
    return folder


def launched(folder: Path, launcher: list, spoiled: str, *arguments: str) -> list[dict]:
    """What two processes leave behind."""
    for rank in range(2):
        (folder / f"told-rank{rank}.json").unlink(missing_ok=True)
    script = [HERE / "verify_sharded.py", folder, spoiled, "verify", *arguments]
    done = start(accelerate_launch(launcher, script), folder)
    told = [folder / f"told-rank{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in told), done.stdout[-3000:] + done.stderr[-6000:]
    return [{**json.loads(path.read_text()), "errors": done.stderr} for path in told]


def config(name: str) -> list:
    return ["--config_file", CONFIGS / f"{name}.yaml"]


def zero3(settings: Path) -> list:
    return ["--use_deepspeed", "--deepspeed_config_file", settings, "--zero3_init_flag", "true"]


@pytest.mark.parametrize(
    ("launcher", "model", "sharding"),
    [
        (lambda folder: config("ddp"), "model", None),
        (lambda folder: config("fsdp2"), "model", "FSDP2"),
        (lambda folder: config("fsdp2"), "adapter", "FSDP2"),
        pytest.param(
            lambda folder: zero3(folder / "zero3.json"),
            "model",
            "ZeRO-3",
            marks=needs_deepspeed,
        ),
    ],
    ids=["ddp", "fsdp2", "fsdp2 adapter", "zero3"],
)  # fmt: skip
def test_every_process_is_right(folder, launcher, model, sharding):
    first, second = launched(folder, launcher(folder), "none", folder / model, "--json")
    assert (first["status"], second["status"], second["printed"]) == (0, 0, ""), first["printed"] + first["errors"]
    report = json.loads(first["printed"])
    assert (report["passed"], report["num_processes"], report["failed_processes"]) == (True, 2, [])
    assert (report["process"], report["sharding"]) == (0, sharding)
    assert first["first prompt"] != second["first prompt"], "each process has samples of its own"
    held = first["elements"] + second["elements"]
    assert held == {None: 2 * first["whole"], "FSDP2": first["whole"], "ZeRO-3": 0}[sharding]  # 0: nothing is gathered
    judged = {finding["what"]: finding for finding in report["findings"]}
    for what in ("rows", "executed ids", "agreement", "mismatch, replayed", "gradients with checkpointing"):
        assert judged[what]["status"] == "right", judged[what]
    assert "nothing was recomputed" not in judged["gradients with checkpointing"]["seen"]


@pytest.mark.parametrize("spoiled", [0, 1])
def test_the_process_that_is_wrong_is_shown(folder, spoiled):
    first, second = launched(folder, config("fsdp2"), str(spoiled), folder / "model")
    assert (first["status"], second["status"], second["printed"]) == (1, 1, "")
    printed = " ".join(first["printed"].split())
    assert f"rank {spoiled} of 2 processes, weights sharded by FSDP2" in printed
    assert "shifted by one token" in printed
    assert f"Something is wrong on rank {spoiled}, see above." in printed


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--engine", "continuous"], "`--engine continuous` runs in one process, this launch has 2"),
        (["--device", "cuda"], "`--device` is 'cuda', but a launch gives each process its own"),
    ],
)
def test_what_a_launch_cannot_do_is_refused(folder, arguments, text):
    first, second = launched(folder, config("ddp"), "none", folder / "model", *arguments)
    assert (first["status"], second["status"]) == (2, 2)
    assert text in first["errors"]
