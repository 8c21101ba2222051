"""Names that commands are given: folders that are not there, and checkpoints that bring code of their own."""

import json
import re
import socket
import sys
import textwrap

import pytest
import torch
from cli.published_configs import PUBLISHED
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from trl_r3.cli import command as cli
from trl_r3.cli.bad_input import BadInput
from trl_r3.cli.configs import read_config, refuse_missing_folder

COMMANDS = {
    "check": lambda name: ["check", name],
    "verify": lambda name: ["verify", name],
    "plan": lambda name: ["plan", "--model", name, "--prompts", "4"],
}
SMALL = MixtralConfig(
    vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """An empty cache, a folder `run` with a checkpoint, and no host whose name may be asked for."""
    asked = []

    def look_up(host, *args, **kwargs):
        asked.append(host)
        raise socket.gaierror(f"{host} is not to be asked for")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not asked


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["run/checkpoint-9", "run/a/b", "./none", "none/", "~/none", "/none/at/all", "a/b/c"])
def test_a_folder_that_is_not_there_is_no_repository(no_hub, name, command, capsys):
    assert cli.main(COMMANDS[command](name)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name} cannot be loaded: there is no such folder.")


def test_the_base_of_an_adapter_is_a_name_as_well(no_hub, capsys):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "run/base", "target_modules": ["q_proj"]}
    (no_hub / "run" / "adapter_config.json").write_text(json.dumps(adapter))
    assert cli.main(["verify", "run"]) == 2
    assert "run/base cannot be loaded: there is no such folder." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["org/model", "gpt2"])
def test_a_repository_is_none_of_these(no_hub, name):
    """The wrong variant would refuse whatever is not here."""
    refuse_missing_folder(name)


def test_a_repository_in_the_cache_beside_a_folder_of_its_owner(no_hub):
    commit, repository = "0" * 40, no_hub / "cache" / "models--run--model"
    for file, text in ((f"snapshots/{commit}/config.json", "{}"), ("refs/main", commit)):
        (repository / file).parent.mkdir(parents=True)
        (repository / file).write_text(text)
    refuse_missing_folder("run/model")
    with pytest.raises(BadInput, match="no such folder"):
        refuse_missing_folder("run/other")


CONFIGURATION = """
    from transformers import MixtralConfig

    class OwnMoeConfig(MixtralConfig):
        model_type = "own_moe"
"""
MODELING = """
    from transformers import MixtralForCausalLM
    from .configuration_own_moe import OwnMoeConfig

    class OwnMoeForCausalLM(MixtralForCausalLM):
        config_class = OwnMoeConfig
"""
NAMED = {
    "AutoConfig": "configuration_own_moe.OwnMoeConfig",
    "AutoModelForCausalLM": "modeling_own_moe.OwnMoeForCausalLM",
}


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A folder with a type and a model of its own, and whether its code has been run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a key is asked for"))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "configuration_own_moe.py").write_text(textwrap.dedent(CONFIGURATION))
    (folder / "modeling_own_moe.py").write_text(textwrap.dedent(MODELING))
    config = {**SMALL.to_dict(), "model_type": "own_moe", "architectures": ["OwnMoeForCausalLM"], "auto_map": NAMED}
    (folder / "config.json").write_text(json.dumps(config))
    before = set(sys.modules)
    yield folder, lambda: any("own_moe" in name for name in set(sys.modules) - before)
    for name in [name for name in sys.modules if name.startswith("transformers_modules") and name not in before]:
        del sys.modules[name]


@pytest.mark.parametrize("command", COMMANDS)
def test_code_of_a_checkpoint_is_not_run_unasked(own_code, command, capsys):
    folder, has_run = own_code
    assert cli.main(COMMANDS[command](str(folder))) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"{folder} cannot be loaded without code of its own: Transformers ")
    assert line.endswith("pass `--trust-remote-code` to run it.") and "'own_moe'" in line
    assert printed.out == "" and not has_run()


@pytest.mark.parametrize("option", ["--trust-remote-code", "--trust_remote_code"])
@pytest.mark.parametrize("command", ["check", "plan"])
def test_code_of_a_checkpoint_that_is_trusted(own_code, command, option, capsys):
    folder, has_run = own_code
    assert cli.main([*COMMANDS[command](str(folder)), option]) == 0
    assert has_run() and "OwnMoeForCausalLM" in capsys.readouterr().out


def test_weights_of_a_checkpoint_that_is_trusted(own_code, capsys):
    folder, has_run = own_code
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(folder)
    capsys.readouterr()
    assert cli.main(["check", str(folder), "--trust-remote-code"]) == 0
    assert f"Checked on the weights of {folder}." in capsys.readouterr().out
    assert cli.main(["check", str(folder)]) == 2
    assert "`--trust-remote-code`" in capsys.readouterr().err


def test_a_type_with_a_config_alone(tmp_path, capsys):
    """Transformers reads the config of a vision tower, and builds no causal LM of it."""
    said = {"model_type": "siglip_vision_model", "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert cli.main(["check", str(tmp_path)]) == 2
    assert (
        "its config names modeling_own.Own. Read that code, and pass `--trust-remote-code`" in capsys.readouterr().err
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_type_that_nobody_has(tmp_path, command, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "moe_of_tomorrow"}))
    assert cli.main(COMMANDS[command](str(tmp_path))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"Transformers \S+ has no model of type 'moe_of_tomorrow', and its config names no code", line)


@pytest.mark.parametrize("name", ["minimax-m2.5", "nemotron-3-nano-30b-a3b", "kimi-k2.5"])
def test_a_type_that_transformers_has_needs_no_code(name, tmp_path):
    """Though its config names some."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name].config))
    assert type(read_config(str(tmp_path))).__module__.startswith("transformers.models.")
