"""What it means for training that a checkpoint is quantized: said by commands that read its config."""

from __future__ import annotations

import inspect
from typing import Any


def quantization_of(config: Any) -> dict[str, Any] | None:
    """What a config, or that of its model for text, says of how weights are stored."""
    for part in (config, config.get_text_config()):
        said = getattr(part, "quantization_config", None)
        if said is not None:
            return said if isinstance(said, dict) else said.to_dict()
    return None


def quantization_note(config: Any) -> str | None:
    """
    What training does with weights that are stored quantized.

    Args:
        config (`transformers.PreTrainedConfig`):
            Of the model.

    Returns:
        `str`, *optional*: Nothing where they are not.
    """
    said = quantization_of(config)
    if said is None:
        return None
    method, reader = _method(said), _reader(said)
    stored = f"The weights of this checkpoint are stored quantized ({method})"
    if reader is None:
        return (
            f"{stored}, which Transformers cannot read: it takes the stored numbers for weights, without their "
            "scales, and warns. Train from a checkpoint in bfloat16."
        )
    frozen = "a quantized weight is not trained, and Trainer refuses such a model without adapters"
    if "dequantize" not in inspect.signature(reader).parameters:
        return f"{stored}: {frozen}. Train adapters, or from a checkpoint in bfloat16."
    return (
        f"{stored}: {frozen}. To train all weights in bfloat16, load it with "
        f"`quantization_config={reader.__name__}(dequantize=True)` in `model_init_kwargs`; where there are no kernels "
        "for it, as without a GPU, Transformers does so by itself. Sizes are those of the weights in that dtype."
    )


def is_unreadable(config: Any) -> bool:
    """Whether Transformers would take stored numbers for weights."""
    said = quantization_of(config)
    return said is not None and _reader(said) is None


def _method(said: dict[str, Any]) -> str:
    method = said.get("quant_method")
    return str(getattr(method, "value", method))


def _reader(said: dict[str, Any]) -> Any:
    """The config class of Transformers for a kind of quantization, if it has one."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = _method(said)
    if said.get("load_in_4bit") or said.get("load_in_8bit"):
        method = f"bitsandbytes_{4 if said.get('load_in_4bit') else 8}bit"
    return AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
