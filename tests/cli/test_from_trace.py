"""A trace on the command line: right weights, other weights, another model, no trace."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from trl_r3 import load_trace
from trl_r3.cli.command import main
from trl_r3.cli.verify import from_trace as trace_command
from trl_r3.traces.trace_file import find_traces, save_trace


@pytest.fixture
def run(qwen3, train, tmp_path):
    """A run in bfloat16 with eager attention, whose checkpoint 1 has the weights of its second trace."""
    qwen3().save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.bfloat16)
    model.set_attn_implementation("eager")
    traces = tmp_path / "traces"
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 1e-1}
    train(model, routing_replay_trace_dir=str(traces), **changes)
    return str(tmp_path / "out" / "checkpoint-1"), find_traces(traces)


def test_status_and_text(run, capsys):
    name, (first, second) = run
    facts = load_trace(second).facts
    assert (facts.dtype, facts.attention) == ("bfloat16", "eager")
    assert main(["verify", name, "--trace", str(second)]) == 0
    assert "step 1: all" in capsys.readouterr().out
    assert main(["verify", name, "--trace", str(first)]) == 1
    assert "Pass the model with the weights of step 0" in capsys.readouterr().out
    assert main(["verify", name, "--trace", str(second), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["matches"] and told["differing"] == 0 < told["tokens"] and told["differences"] == []


def test_buffers_in_another_dtype_are_named(run, capsys, monkeypatch):
    """`to(torch.bfloat16)` rounds the frequencies of the positions as well, which loading in this dtype does not."""
    name, (_, second) = run
    load_model = trace_command.load_model

    def load_and_cast(*args, **kwargs):
        loaded = load_model(*args, **kwargs)
        loaded.model.to(torch.bfloat16)
        return loaded

    monkeypatch.setattr(trace_command, "load_model", load_and_cast)
    assert main(["verify", name, "--trace", str(second)]) == 1
    assert "Not as it was: buffers: float32 in the trace, bfloat16 here" in capsys.readouterr().out


def test_bad_input_is_one_sentence(run, qwen3, tmp_path, capsys):
    name, (first, _) = run
    qwen3(num_experts=8).to(torch.bfloat16).save_pretrained(tmp_path / "other")
    (tmp_path / "damaged").write_bytes(first.read_bytes()[:900])
    for model, path, says in (
        (str(tmp_path / "other"), first, "Pass the model that was trained, with the weights of step 0"),
        (name, tmp_path / "damaged", "cannot be read as a trace"),
        (name, tmp_path / "nowhere", "there is no trace"),
        (str(tmp_path / "nothing"), first, "nothing"),
    ):
        assert main(["verify", model, "--trace", str(path)]) == 2
        told = capsys.readouterr()
        assert says in told.err and "Traceback" not in told.err and told.out == ""


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"device": "xpu"}, "the trace was made on xpu, which is not here"),
        ({"attention": "flash_attention_2"}, "made with attention flash_attention_2 and experts"),
    ],
)
def test_what_is_not_on_this_machine_is_named(run, tmp_path, capsys, changed, says):
    """Traces are made on machines with accelerators and their kernels, and looked at on others."""
    name, (_, second) = run
    trace = load_trace(second)
    moved = save_trace(replace(trace, facts=replace(trace.facts, **changed)), tmp_path)
    assert main(["verify", name, "--trace", str(moved)]) == 2
    told = capsys.readouterr()
    assert says in told.err and "Traceback" not in told.err
    if "device" in changed:
        assert main(["verify", name, "--trace", str(moved), "--device", "cpu"]) == 0


def test_adapters_in_float32_tell_the_dtype_of_their_base(qwen3, train, tmp_path, capsys):
    """The checkpoint is stored in float32 and was trained in bfloat16, beside which PEFT keeps adapters in float32."""
    qwen3().save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.bfloat16)
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 1e-1}
    adapters = LoraConfig(target_modules=["q_proj", "v_proj"])
    train(model, routing_replay_trace_dir=str(tmp_path / "traces"), peft_config=adapters, **changes)
    _, second = find_traces(tmp_path / "traces")
    assert load_trace(second).facts.dtype == "bfloat16, float32"
    assert main(["verify", str(tmp_path / "out" / "checkpoint-1"), "--trace", str(second)]) == 0, capsys.readouterr()


def test_tokens_that_the_model_lacks_are_named(run, tmp_path, capsys):
    """Of another Transformers, whose configs are not compared."""
    name, (_, second) = run
    trace = load_trace(second)
    tokens = trace.tokens.clone()
    tokens[0] = 100_000
    facts = replace(trace.facts, versions={**trace.facts.versions, "transformers": "5.17.0"})
    foreign = save_trace(replace(trace, tokens=tokens, facts=facts), tmp_path)
    assert main(["verify", name, "--trace", str(foreign)]) == 2
    assert "the trace has token 100000, this model " in capsys.readouterr().err
