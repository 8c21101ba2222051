"""`trl-r3 verify` against a real vLLM, in the process and as a server."""

from __future__ import annotations

import json

import cpu_engine
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_r3.cli import command as cli

pytestmark = pytest.mark.vllm


def verify(capfd, *arguments):
    """Exit status, and what was printed as JSON."""
    status = cli.main(["verify", *map(str, arguments), "--json"])
    return status, json.loads(capfd.readouterr().out)


def found(report):
    return {each["what"]: (each["status"], each["seen"]) for each in report["findings"]}


def assert_all_right(status, report):
    assert status == 0, report
    statuses = {what: each for what, (each, _) in found(report).items()}
    assert {what for what, each in statuses.items() if each == "not judged"} == {"live routing", "mismatch, live"}
    assert found(report)["rows"][1].startswith("824 expected: 824 present")
    assert all(layer["other_ids"] == 0 and layer["agreement"] > 0.9 for layer in report["layers"])


def test_colocate(model_folder, capfd):
    status, report = verify(capfd, model_folder, "--engine", "vllm")
    assert_all_right(status, report)
    assert "the engine says processed_logprobs" in found(report)["log-probabilities"][1]


def test_an_adapter_is_merged_into_what_the_engine_serves(model_folder, tmp_path, capfd):
    policy = AutoModelForCausalLM.from_pretrained(model_folder)
    targets = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    policy = get_peft_model(policy, LoraConfig(r=2, init_lora_weights=False, **targets))
    policy.save_pretrained(tmp_path)
    status, report = verify(capfd, tmp_path, "--engine", "vllm")
    assert_all_right(status, report)
    assert report["model"].startswith(f"{model_folder} with the adapter")


def test_other_weights_are_named(model_folder, tmp_path, server_url, capfd):
    cpu_engine.save_with_tokenizer(cpu_engine.tiny_qwen3_moe(seed=1), tmp_path)
    status, report = verify(capfd, tmp_path, "--engine", "server", "--url", server_url)
    assert status == 1
    (agreement,) = [each for each in report["findings"] if each["what"] == "agreement"]
    assert agreement["status"] == "wrong" and "the engine serves the weights that score" in agreement["remedy"]


def test_server(model_folder, server_url, capfd):
    status, report = verify(capfd, model_folder, "--engine", "server", "--url", server_url)
    assert_all_right(status, report)
    assert report["rollout"].endswith(server_url)
