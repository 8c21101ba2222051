"""The command, but for what has tests of its own."""

import json
from itertools import count

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from trl_r3 import RouterReplay, UnsupportedRouterError
from trl_r3.cli import command as cli

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def saved(tmp_path):
    def save(config):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        return str(tmp_path)

    return save


def test_check_says_what_it_found(saved, capsys):
    config = Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=8, num_experts=12, num_experts_per_tok=3, mlp_only_layers=[0, 2]
    )
    assert cli.main(["check", saved(config)]) == 0
    rows = _rows(capsys.readouterr().out)
    assert rows["routers"] == "Qwen3MoeTopKRouter"
    assert (rows["decoder layers"], rows["MoE layers"], rows["dense layers"]) == ("4", "2: 1, 3", "2: 0, 2")
    assert (rows["experts (E)"], rows["experts a token (K)"], rows["stored bytes a token"]) == ("12", "3", "6")
    assert rows["own record"].startswith("passes: 0 of ")
    assert rows["foreign record"].startswith("passes: 32 of 32 ")


def test_check_prints_json(saved, capsys):
    """Alone on its stream, and with the facts of the table."""
    config = Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=8, num_experts=12, num_experts_per_tok=3, mlp_only_layers=[0]
    )
    name = saved(config)
    assert cli.main(["check", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True and found["architecture"] == "Qwen3MoeForCausalLM" and name in found["origin"]
    assert (found["moe_layers"], found["decoder_layers"]) == ([1, 2, 3], 4)
    assert (found["num_experts"], found["top_k"], found["bytes_per_token"]) == (12, 3, 9)
    assert [(each["what"], each["passed"]) for each in found["findings"]] == [
        ("own record", True),
        ("foreign record", True),
    ]


def test_check_takes_a_dtype(saved, capsys):
    name = saved(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    assert cli.main(["check", name, "--dtype", "bfloat16"]) == 0
    assert _rows(capsys.readouterr().out)["MoE layers"] == "4: 0-3"


@pytest.mark.parametrize("enough_for", [0, 1])
def test_check_on_a_device_that_is_full(saved, capsys, monkeypatch, enough_for):
    """After so many forwards, that is: while replay is attached, or tried."""
    from trl_r3.cli import check

    load_model = check.load_model

    def load_and_fill(*args, **kwargs):
        loaded, calls = load_model(*args, **kwargs), count()

        def fill(module, args):
            if next(calls) >= enough_for:
                raise torch.OutOfMemoryError("out of memory")

        loaded.model.model.layers[0].register_forward_pre_hook(fill)
        return loaded

    monkeypatch.setattr(check, "load_model", load_and_fill)
    assert cli.main(["check", saved(Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2))]) == 1
    assert "OutOfMemoryError: out of memory" in capsys.readouterr().err


def test_check_fails_where_replay_does_not_take_effect(saved, capsys, monkeypatch):
    from trl_r3.cli import check

    monkeypatch.setattr(check, "check_foreign", lambda model, replay: (False, "0 of 32 tokens get other logits"))
    assert cli.main(["check", saved(MixtralConfig(**SIZES, num_local_experts=4))]) == 1
    printed = capsys.readouterr()
    assert "foreign record" in printed.err
    assert "FAILS" in printed.out


def test_check_uses_the_weights_that_are_there(saved, capsys):
    name = saved(MixtralConfig(**SIZES, num_local_experts=4))
    assert cli.main(["check", name]) == 0
    assert f"Checked on the weights of {name}." in capsys.readouterr().out


QWEN3_30B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 40960,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def test_check_of_a_config_without_weights(tmp_path, capsys):
    """Thirty billion parameters, as a twin of a few million."""
    Qwen3MoeConfig(**QWEN3_30B).save_pretrained(tmp_path)
    assert cli.main(["check", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"a narrow twin of the config of {tmp_path} (hidden size 64, vocabulary 256, random weights)" in printed
    rows = _rows(printed)
    assert (rows["MoE layers"], rows["experts (E)"], rows["experts a token (K)"]) == ("48: 0-47", "128", "8")
    assert rows["foreign record"].startswith("passes: 32 of 32 ")


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss", "llama4_text", "nemotron_h", "qwen3_vl_moe"])
def test_twins_keep_layers_and_experts(model_type):
    from trl_r3.cli.twin import narrow_config, narrow_twin

    whole = CONFIG_MAPPING[model_type]()
    twin, config = narrow_twin(whole, model_type), whole.get_text_config()
    narrow = twin.config.get_text_config()
    kept = ("num_hidden_layers", "n_routed_experts", "num_local_experts", "num_experts_per_tok", "layer_types")
    assert [getattr(narrow, name, 0) for name in kept] == [getattr(config, name, 0) for name in kept]
    assert narrow.hidden_size == 64 and twin.get_input_embeddings().num_embeddings == 256
    assert sum(parameter.numel() for parameter in twin.parameters()) < 1e8
    assert config.hidden_size > 64, "the config itself is left alone"
    assert narrow_config(config, None).num_attention_heads == config.num_attention_heads


def test_check_of_an_id_without_weights_here(tmp_path, capsys, monkeypatch):
    """Nothing is downloaded but the config."""
    from trl_r3.cli import check

    def not_here(name, dtype, device, downloads, trust_remote_code):
        assert not downloads
        raise OSError("no such file in the cache")

    config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2)
    monkeypatch.setattr(check, "load_model", not_here)
    monkeypatch.setattr(check, "adapter_base", lambda name: None)
    monkeypatch.setattr(check, "load_config", lambda name, trust_remote_code: config)
    assert cli.main(["check", "org/model"]) == 0
    assert "a narrow twin of the config of org/model" in capsys.readouterr().out


def test_check_of_an_adapter(saved, tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(saved(MixtralConfig(**SIZES, num_local_experts=4)))
    adapter = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    assert cli.main(["check", str(tmp_path / "adapter")]) == 0
    assert f"Checked on {tmp_path} with the adapter {tmp_path / 'adapter'}." in capsys.readouterr().out


def test_the_base_of_an_adapter_is_not_downloaded(saved, tmp_path, capsys, monkeypatch):
    """Its config is, and stands for it."""
    from trl_r3.cli import check

    config = MixtralConfig(**SIZES, num_local_experts=4)
    base = AutoModelForCausalLM.from_pretrained(saved(config))
    adapter = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    adapter.peft_config["default"].base_model_name_or_path = "org/base"
    adapter.save_pretrained(tmp_path / "adapter")

    def not_here(name, dtype, device, downloads, trust_remote_code):
        assert not downloads
        raise OSError("no such file in the cache")

    monkeypatch.setattr(check, "load_model", not_here)
    monkeypatch.setattr(check, "load_config", lambda name, trust_remote_code: config)
    assert cli.main(["check", str(tmp_path / "adapter")]) == 0
    assert f"a narrow twin of the config of {tmp_path / 'adapter'}" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["check"], ["verify"], ["plan", "--prompts", "2", "--model"]])
@pytest.mark.parametrize(
    ("config", "says"),
    [({"model_type": "qwen3_moe", "num_hidden_layers": "3"}, "expected int, got str"), ([1], "'list' object")],
)
def test_a_config_that_its_class_refuses_is_bad_input(tmp_path, capsys, command, config, says):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main([*command, str(tmp_path)]) == 2
    assert says in _sentence(capsys)


def test_a_twin_that_cannot_be_made_is_bad_input(tmp_path, capsys):
    Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=8).save_pretrained(tmp_path)
    assert cli.main(["check", str(tmp_path)]) == 2
    assert "its config cannot be made narrow" in _sentence(capsys)


COMMANDS = ("check", "verify")


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_input_is_one_sentence(command, saved, tmp_path, capsys):
    dense, nothing = saved(LlamaConfig(**SIZES)), tmp_path / "nothing"
    torn = tmp_path / "torn"
    Qwen3MoeConfig(**SIZES).save_pretrained(torn)
    (torn / "model.safetensors").write_bytes(b"no weights")
    capsys.readouterr()
    for arguments, said in (
        ([dense], "LlamaForCausalLM is a dense model"),
        ([nothing], "nothing cannot be loaded: there is no such folder"),
        ([torn], "torn cannot be loaded"),
        ([dense, "--dtype", "float33"], "'float33', which is no torch dtype"),
        ([dense, "--device", "abacus"], "`--device` is 'abacus'"),
    ):
        assert cli.main([command, *map(str, arguments)]) == 2, arguments
        assert said in _sentence(capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_router_that_is_not_supported_is_no_bad_input(command, saved, capsys, monkeypatch):
    """It ran, and something does not hold."""
    from trl_r3.routers import discovery

    def refuse(*args):
        raise UnsupportedRouterError("model.layers.0.mlp.gate cannot be replayed.")

    monkeypatch.setattr(discovery, "_checked", refuse)
    assert cli.main([command, saved(MixtralConfig(**SIZES, num_local_experts=4))]) == 1
    assert "UnsupportedRouterError: model.layers.0.mlp.gate" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_to(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--smoke", "--output", str(tmp_path / "file" / "deeper" / "log.json")]) == 2
    assert "cannot be written to" in _sentence(capsys)


def test_foreign_check_notices_a_record_without_effect(saved):
    from trl_r3.cli import check

    model = AutoModelForCausalLM.from_pretrained(saved(MixtralConfig(**SIZES, num_local_experts=4))).eval()
    with RouterReplay(model) as replay:
        assert check.check_foreign(model, replay)[0]
        for layer in model.model.layers:  # equal experts: the selection no longer matters
            for parameter in layer.mlp.experts.parameters():
                parameter.data[:] = parameter.data[0]
            layer.mlp.gate.weight.data.zero_()
        assert not check.check_foreign(model, replay)[0]


@pytest.mark.parametrize(
    "arguments",
    [["demo", "--model", "llama"], ["check"], ["bench"], ["verify", "m", "--engine", "x"]],
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: trl-r3" in capsys.readouterr().err


def _sentence(capsys):
    """What was said of bad input: one line, and nothing that was printed before it."""
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line and "Loading weights" not in line]
    assert "Traceback" not in line and line.endswith(".") and printed.out == ""
    return line


def _rows(output):
    cells = [line.split("\u2502")[1:3] for line in output.splitlines() if "\u2502" in line]  # a rich table's border
    return {label.strip(): value.strip() for label, value in cells}
