"""`trl-r3 verify` started by `accelerate launch`: weights sharded as in training, one report of all processes."""

from __future__ import annotations

import json

import pytest
from sharded.launching import needs_deepspeed


@pytest.mark.parametrize(
    ("name", "sharding"),
    [
        ("ddp", None),
        ("fsdp2", "FSDP2"),
        ("fsdp2 adapter", "FSDP2"),
        pytest.param("zero3", "ZeRO-3", marks=needs_deepspeed),
    ],
    ids=["ddp", "fsdp2", "fsdp2 adapter", "zero3"],
)
def test_every_process_is_right(results, name, sharding):
    first, second = results(f"verify {name}")
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
def test_the_process_that_is_wrong_is_shown(results, spoiled):
    first, second = results(f"verify spoiled {spoiled}")
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
def test_what_a_launch_cannot_do_is_refused(results, arguments, text):
    first, second = results(f"verify {arguments[-1]}")
    assert (first["status"], second["status"]) == (2, 2)
    assert text in first["errors"]
