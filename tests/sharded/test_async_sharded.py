"""Asynchronous GRPO on two processes: records wait on the first one, and each gets those of its own rows."""

from __future__ import annotations

import pytest
from sharded.launching import needs_deepspeed


@pytest.mark.parametrize("name", ["ddp async", "fsdp2 async", "fsdp2 async lora"])
def test_every_row_of_every_process_is_that_of_the_server(results, name):
    pytest.importorskip("aiohttp", reason="TRL's rollout process needs `pip install aiohttp`")
    first, second = results(name)
    assert first["tokens"] != second["tokens"], "each process has rows of its own"
    for each in (first, second):
        assert (each["wrong"], each["total"] > 100, min(each["changed"]) > 0.5) == (0, True, True)
        assert [entry["routing_replay/replayed_frac"] for entry in each["log"]] == [1.0, 1.0]
    assert first["log"] == second["log"], "shares are those of all processes"
    assert first["held"] > 0 == second["held"], "no process holds the records of others, but the first"


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_an_error_in_records_is_one_on_all_processes(results, config):
    pytest.importorskip("aiohttp", reason="TRL's rollout process needs `pip install aiohttp`")
    first, second = results(f"{config} async error")
    assert first == second
    assert "have no record, but `routing_replay_max_missing` allows 0.00%" in first["error"]


@needs_deepspeed
def test_weights_that_trl_does_not_gather_are_refused(results):
    pytest.importorskip("aiohttp", reason="TRL's rollout process needs `pip install aiohttp`")
    first, second = results("zero3 async")
    assert first == second
    assert "the ZeRO stage is 3, and TRL's asynchronous GRPO would send the server empty weights" in first["error"]
