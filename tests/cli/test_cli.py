"""The command, but for what has tests of its own."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from trl_r3 import RouterReplay
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


def test_check_takes_a_dtype(saved, capsys):
    name = saved(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    assert cli.main(["check", name, "--dtype", "bfloat16"]) == 0
    assert _rows(capsys.readouterr().out)["MoE layers"] == "4: 0-3"


def test_check_refuses_a_dense_model(saved, capsys):
    assert cli.main(["check", saved(LlamaConfig(**SIZES))]) == 1
    printed = capsys.readouterr()
    assert "UnsupportedRouterError" in printed.err
    assert "LlamaForCausalLM is a dense model" in printed.err
    assert "Routing replay works" not in printed.out


def test_check_fails_where_replay_does_not_take_effect(saved, capsys, monkeypatch):
    from trl_r3.cli import check

    monkeypatch.setattr(check, "check_foreign", lambda model, replay: (False, "0 of 32 tokens get other logits"))
    assert cli.main(["check", saved(MixtralConfig(**SIZES, num_local_experts=4))]) == 1
    printed = capsys.readouterr()
    assert "foreign record" in printed.err
    assert "FAILS" in printed.out


def test_check_of_a_name_that_does_not_exist(tmp_path, capsys):
    assert cli.main(["check", str(tmp_path / "nothing")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_check_of_a_dtype_that_does_not_exist(tmp_path, capsys):
    assert cli.main(["check", str(tmp_path), "--dtype", "float33"]) == 2
    assert "float33" in capsys.readouterr().err


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


@pytest.mark.parametrize("arguments", [[], ["demo", "--model", "llama"], ["check"], ["bench", "speed"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: trl-r3" in capsys.readouterr().err


def _rows(output):
    cells = [line.split("\u2502")[1:3] for line in output.splitlines() if "\u2502" in line]  # a rich table's border
    return {label.strip(): value.strip() for label, value in cells}
