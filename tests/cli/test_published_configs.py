"""`trl-r3 check` and `plan` on what published checkpoints say of themselves, and on the kinds of config among them."""

import functools
import json

import pytest
import torch
from cli.published_configs import PUBLISHED
from transformers import CONFIG_MAPPING

from trl_r3.cli import command as cli
from trl_r3.cli.plan import planning
from trl_r3.cli.twin import narrow_config, narrow_twin, one_thread


def saved(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def rows_of(printed):
    """What `check` says, by row of its table, which has no borders to cut a row."""
    cells = [line.split("\u2502")[1:3] for line in printed.splitlines() if "\u2502" in line]
    rows, label = {}, ""
    for left, right in cells:  # a long value goes on below
        label = left.strip() or label
        rows[label] = f"{rows.get(label, '')} {right.strip()}".strip()
    return rows


QUANTIZED = {
    "qwen3-30b-a3b-fp8": "(fp8)",
    "gpt-oss-20b": "Mxfp4Config(dequantize=True)",
    "kimi-k2.5": "(compressed-tensors)",
    "qwen3.6-35b-a3b-nvfp4": "Train from a checkpoint in bfloat16.",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name, tmp_path, capsys, monkeypatch):
    published = PUBLISHED[name]
    folder = saved(tmp_path, published.config)
    monkeypatch.setattr(planning, "read_model", functools.cache(planning.read_model))  # one for both forms of a plan
    plan = ["plan", "--model", folder, "--prompts", "1", "--tokens", "64"]
    is_quantized = "quantization_config" in published.config | published.config.get("text_config", {})
    assert cli.main(["check", folder]) == 0
    rows = rows_of(checked := capsys.readouterr().out)
    assert cli.main(plan) in (0, 1)
    for printed in (checked, capsys.readouterr().out):
        printed = " ".join(printed.split())
        assert ("stored quantized" in printed) is is_quantized
        assert QUANTIZED.get(name, "") in printed
    assert rows["MoE layers"] == published.moe_layers
    assert (rows["experts (E)"], rows["experts a token (K)"]) == (str(published.experts), str(published.top_k))
    assert rows["own record"].startswith("passes: 0 of ") and rows["foreign record"].startswith("passes: 32 of 32 ")
    assert cli.main([*plan, "--json"]) in (0, 1)
    model = json.loads(capsys.readouterr().out)["model"]
    assert bool(model["quantization"]) is is_quantized
    assert model["parameters"] == pytest.approx(published.billions * 1e9, rel=1e-2)
    assert model["expert_parameters"] == published.of_experts
    layout = model["layout"]
    assert f"{len(layout['moe_layers'])}:" == published.moe_layers.partition(" ")[0]
    assert (layout["num_experts"], layout["top_k"]) == (published.experts, published.top_k)


NEMOTRON_SUPER = {
    **PUBLISHED["nemotron-3-nano-30b-a3b"].config,
    "hybrid_override_pattern": "MEMEMEM*E" * 9 + "MEMEMEM",
    "hidden_size": 4096, "mamba_num_heads": 128, "moe_latent_size": 1024, "n_routed_experts": 512,
    "num_experts_per_tok": 22, "moe_intermediate_size": 2688, "moe_shared_expert_intermediate_size": 5376,
}  # fmt: skip
HYBRIDS = {
    "granitemoehybrid": {"layer_types": (["mamba"] * 5 + ["attention"]) * 2, "num_hidden_layers": 12},
    "nemotron_h": NEMOTRON_SUPER,
    "jamba": {"num_hidden_layers": 8},
}


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_state_space_layers_are_narrow(model_type):
    """Every weight has the size of a twin's, and what is scanned at a time is a few tokens."""
    whole = CONFIG_MAPPING[model_type](**{k: v for k, v in HYBRIDS[model_type].items() if k != "model_type"})
    twin = narrow_twin(whole, model_type)
    assert sum(not name.startswith("lm_head") for name, _ in twin.named_parameters()) > 20
    mixers = [(n, p) for n, p in twin.named_parameters() if ".mamba." in n or ".mixer." in n]
    assert mixers and max(p.numel() for n, p in mixers if "experts" not in n) <= 2**15
    for name in ("mamba_chunk_size", "chunk_size"):
        assert getattr(twin.config, name, 16) == 16 and not 0 < getattr(whole, name, 256) <= 16


@pytest.mark.parametrize("ends", [1, [1, 2, 3], [1]])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe", "gpt_oss", "qwen3_vl_moe"])
def test_texts_that_end_with_one_of_several_tokens(ends, model_type):
    whole = CONFIG_MAPPING[model_type]()
    text = whole.get_text_config()
    text.eos_token_id = ends
    narrow = narrow_config(text, None)
    assert narrow.eos_token_id is None and text.eos_token_id == ends
    type(narrow)(**narrow.to_dict())  # values that its class takes


def test_widths_by_layer_stay_by_layer():
    whole = CONFIG_MAPPING["hunyuan_v1_moe"](num_hidden_layers=3, moe_intermediate_size=[64, 128, 64])
    assert narrow_config(whole, None).moe_intermediate_size == [16] * 3


def test_threads_are_given_back():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ZeroDivisionError), one_thread():
            assert torch.get_num_threads() == 1
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_twin_is_computed_by_one_thread(tmp_path, monkeypatch):
    """Whatever the environment says: the threads that the model ran with, and those of a model with weights."""
    from trl_r3.cli import check

    seen = []
    tried = check._try_replay
    monkeypatch.setattr(check, "_try_replay", lambda loaded: seen.append(torch.get_num_threads()) or tried(loaded))
    threads = torch.get_num_threads()
    config = {**PUBLISHED["mixtral-8x7b"].config, "num_hidden_layers": 2}
    try:
        torch.set_num_threads(2)
        assert cli.main(["check", saved(tmp_path, config)]) == 0
        model = narrow_twin(CONFIG_MAPPING["mixtral"](num_hidden_layers=2), "mixtral")
        model.save_pretrained(tmp_path / "weights")
        assert cli.main(["check", str(tmp_path / "weights")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert seen == [1, 2]
