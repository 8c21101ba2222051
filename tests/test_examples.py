"""The examples, as a user runs them, on tiny models and data from disk."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trl_r3 import R3GRPOTrainer
from trl_r3.cli.demo.policy import build_tokenizer, make_sums, mixtral_config, qwen3_config

EXAMPLES = Path(__file__).parent.parent / "examples"
CONFIGS = {"grpo_qwen3_moe": qwen3_config, "grpo_mixtral": mixtral_config}
ADAPTED = {"grpo_qwen3_moe": {"q_proj", "v_proj"}, "grpo_mixtral": {"q_proj", "v_proj", "experts", "gate"}}
LORA = {
    "grpo_qwen3_moe": ["--lora_target_modules", "q_proj", "v_proj"],
    "grpo_mixtral": [
        *["--lora_dropout", "0", "--lora_target_modules", "q_proj", "v_proj"],
        *["--lora_target_parameters", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    ],
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for small matrices
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def disk(tmp_path):
    """A folder to which models and data can be saved."""

    def save(config):
        torch.manual_seed(0)
        config.num_hidden_layers = 2
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
        build_tokenizer().save_pretrained(tmp_path / "model")
        (tmp_path / "data").mkdir()
        rows = [json.dumps({"prompt": problem.prompt, "answer": problem.answer}) for problem in make_sums(3)]
        (tmp_path / "data" / "train.json").write_text("\n".join(rows))
        return tmp_path

    return save


def _load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _train(name, folder, monkeypatch, *more):
    """Run an example with its command line, and return the trainer it made."""
    trainers = []

    class Watched(R3GRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    arguments = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "data",
        "output_dir": folder / "out",
        "use_routing_replay": "true",
        "routing_replay_compare_every": 1,
        "dtype": "float32",
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "beta": 0.1,  # a gradient, whatever the rewards are
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": "true",
        "bf16": "false",
    }
    line = [part for name_, value in arguments.items() for part in (f"--{name_}", str(value))]
    monkeypatch.setattr(sys, "argv", [name, *line, *more])
    example = _load(name)
    monkeypatch.setattr(example, "R3GRPOTrainer", Watched)
    types = (example.ScriptArguments, example.R3GRPOConfig, example.ModelConfig)
    example.main(*example.TrlParser(types).parse_args_and_config())
    (trainer,) = trainers
    return trainer


def _logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("name", CONFIGS)
def test_full_fine_tuning(name, disk, monkeypatch):
    folder = disk(CONFIGS[name]())
    trainer = _train(name, folder, monkeypatch)
    assert _logged(trainer, "routing_replay/replayed_frac") == [1.0, 1.0]
    assert len(_logged(trainer, "sampling/live/k3_kl")) == 2
    before, after = load_file(folder / "model/model.safetensors"), load_file(folder / "out/model.safetensors")
    gates = [key for key in before if "gate.weight" in key]
    assert gates
    assert all(not torch.equal(before[key], after[key]) for key in gates)


@pytest.mark.parametrize("name", CONFIGS)
def test_lora(name, disk, monkeypatch):
    folder = disk(CONFIGS[name]())
    trainer = _train(name, folder, monkeypatch, "--use_peft", "--lora_r", "2", *LORA[name])
    assert _logged(trainer, "routing_replay/replayed_frac") == [1.0, 1.0]
    adapter = load_file(folder / "out/adapter_model.safetensors")
    modules = {module for key in adapter for module in key.split(".")}
    assert modules & {"q_proj", "k_proj", "v_proj", "o_proj", "experts", "gate"} == ADAPTED[name]
    assert all(value.any() for key, value in adapter.items() if "lora_B" in key)
    assert not (folder / "out/model.safetensors").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_docstring_is_a_command_line(name):
    """Every option of the launch line is one that the parser knows."""
    example = _load(name)
    options = set(re.findall(r"--(\w+)", example.__doc__)) - {"config_file"}
    assert "use_routing_replay" in options
    known = example.TrlParser((example.ScriptArguments, example.R3GRPOConfig, example.ModelConfig)).format_help()
    assert not {option for option in options if f"--{option} " not in known.replace("]", " ").replace(",", " ")}


def test_rewards():
    qwen3, mixtral = _load("grpo_qwen3_moe"), _load("grpo_mixtral")
    chat = [[{"role": "assistant", "content": "so it is 1,234."}], [{"role": "assistant", "content": "12, not 13"}]]
    assert qwen3.answer_reward(chat, answer=[1234, "12"]) == [1.0, 0.0]
    assert qwen3.answer_reward(["none", "-5"], answer=["5", "-5"]) == [0.0, 1.0]
    assert qwen3.brevity_reward(["ab", "abcd"]) == [-0.002, -0.004]
    assert mixtral.answer_reward(["it is 46.", "46 or 47"], answer=["46", "46"]) == [1.0, 0.0]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_replay_without_trl(config, disk, capsys):
    folder = disk(config())
    _load("replay_without_trl").main([str(folder / "model"), "--max_new_tokens", "8"])
    printed = capsys.readouterr().out
    layers, top_k = (1, 4) if config is qwen3_config else (2, 2)
    shape = re.search(r"routes .*: \((\d+), (\d+), (\d+), (\d+)\)", printed)
    assert [int(size) for size in shape.groups()][2:] == [layers, top_k]
    assert re.search(r"loss \d+\.\d+", printed)
    assert re.search(rf"in \d+ of {(int(shape[2]) - 1) * layers} routers", printed)


def test_steady_recompute(disk, monkeypatch, capsys):
    folder = disk(qwen3_config())
    (folder / "data" / "train.json").write_text("\n".join(json.dumps({"text": each.prompt}) for each in make_sums(8)))
    line = [
        "--model_name_or_path",
        folder / "model",
        "--dataset_name",
        folder / "data",
        "--output_dir",
        folder / "out",
    ]
    line += ["--max_steps", 2, "--report_to", "none", "--use_cpu", "true", "--bf16", "false", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["steady_recompute", *map(str, line)])
    example = _load("steady_recompute")
    example.main(*example.TrlParser(example.TYPES).parse_args_and_config())
    assert "RouterReplay(Qwen3MoeTopKRouter" in capsys.readouterr().out
    before, after = load_file(folder / "model/model.safetensors"), load_file(folder / "out/model.safetensors")
    assert any(not torch.equal(before[key], after[key]) for key in before if "gate.weight" in key)
    options = set(re.findall(r"--(\w+)", example.__doc__))
    known = example.TrlParser(example.TYPES).format_help()
    assert options and not {option for option in options if f"--{option} " not in known.replace("]", " ")}
