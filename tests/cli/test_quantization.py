"""What commands say of checkpoints that are stored quantized is what Transformers does with them."""

import json

import pytest
import torch
from cli.published_configs import FP8
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.trainer_utils import validate_quantization_for_training

from trl_r3.cli import command as cli


def save_quantized(folder, quantization, scale_name):
    """A tiny model whose projections are FP8 numbers with one scale each; the model before that."""
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=64, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder)
    stored = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if "_proj.weight" not in name:
            stored[name] = value
            continue
        scale = value.abs().max() / 448
        stored[name] = (value / scale).to(torch.float8_e4m3fn)
        stored[name.replace("weight", scale_name)] = scale.reshape(1, 1).clone()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": quantization}))
    return model


def error(model, loaded):
    """Of a projection, relative to its largest weight."""
    one, other = (each.model.layers[0].self_attn.q_proj.weight.detach().float() for each in (model, loaded))
    return float((one - other).abs().max() / one.abs().max())


def test_fp8_weights_are_trained_when_they_are_dequantized(tmp_path, capsys, monkeypatch):
    model = save_quantized(tmp_path, FP8, "weight_scale_inv")
    assert cli.main(["check", str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "stored quantized (fp8)" in printed
        and "`quantization_config=FineGrainedFP8Config(dequantize=True)`" in printed
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FineGrainedFP8Config(dequantize=True))
    validate_quantization_for_training(whole)
    assert error(model, whole) < 0.05
    assert all(p.requires_grad and p.dtype.itemsize > 1 for p in whole.parameters())
    # as beside a GPU that has kernels for it
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **kwargs: None)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert kept.model.layers[0].self_attn.q_proj.weight.dtype == torch.float8_e4m3fn
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        validate_quantization_for_training(kept)


def test_numbers_whose_scales_transformers_leaves_out_are_no_weights(tmp_path, capsys):
    model = save_quantized(tmp_path, {"quant_method": "modelopt", "quant_algo": "FP8"}, "weight_scale")
    assert error(model, AutoModelForCausalLM.from_pretrained(tmp_path)) > 1000  # without an error
    capsys.readouterr()
    for command in ("check", "verify"):
        assert cli.main([command, str(tmp_path)]) == 2
        assert "takes the stored numbers for weights, without their scales" in capsys.readouterr().err
