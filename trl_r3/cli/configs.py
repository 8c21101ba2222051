"""Read the config of what a command was given, and refuse in a sentence what libraries ask, try or name for long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._compat import has_model
from .bad_input import BadInput

_ADAPTER = "adapter_config.json"


def read_config(name: str, trust_remote_code: bool = False) -> Any:
    """
    The config of a model by its id or folder.

    Args:
        name (`str`):
            Id on the Hugging Face Hub, or a local folder.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the checkpoint is run.

    Returns:
        `transformers.PreTrainedConfig`.

    Raises:
        [`BadInput`]: If there is no such folder, or only code of the checkpoint's own or nothing builds such a model.
        `OSError`, `ValueError` or `KeyError`: What Transformers has to say of a config that it cannot read.
    """
    from transformers import AutoConfig

    refuse_missing_folder(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except ValueError:
        if not trust_remote_code:
            _refuse_unknown_type(name)
        raise
    if not trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        _refuse_unknown_model(name, config)
    return config


def refuse_missing_folder(name: str) -> None:
    """
    Refuse the name of a folder that is not there, before the Hub is asked for a repository of this name.

    A name that begins as a path does is one, and so is `run/checkpoint-9` beside a folder `run`, unless the cache of
    the Hub has such a repository.

    Raises:
        [`BadInput`]: Naming it.
    """
    path = Path(name)
    if path.exists():
        return
    *parents, _ = path.parts or ("",)
    if not (path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or len(parents) > 1):
        if not parents or not Path(parents[0]).is_dir():
            return
        if is_cached(name):
            return
    raise BadInput(
        f"{name} cannot be loaded: there is no such folder. Pass a folder with a model, or its id on the Hub."
    )


def is_cached(name: str) -> bool:
    """Whether the cache of the Hub has the config of a repository."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", _ADAPTER))
    except ValueError:  # no name that a repository can have
        return False


def needs_code(name: str, what: str) -> BadInput:
    """The error for a checkpoint that only code of its own can load."""
    return BadInput(
        f"{name} cannot be loaded without code of its own: {what}. Read that code, and pass `--trust-remote-code` to "
        "run it."
    )


def _refuse_unknown_type(name: str) -> None:
    """Refuse a type that Transformers lacks, whether the config names code of its own or not."""
    import transformers
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    said, _ = PreTrainedConfig.get_config_dict(name)
    model_type = said.get("model_type")
    if model_type is None or model_type in CONFIG_MAPPING:
        return
    lacks = f"Transformers {transformers.__version__} has no model of type {model_type!r}"
    if "AutoConfig" in (said.get("auto_map") or {}):
        raise needs_code(name, f"{lacks}, and its config names {said['auto_map']['AutoConfig']}")
    raise BadInput(
        f"{name} cannot be loaded: {lacks}, and its config names no code of its own. Upgrade Transformers, or set "
        "`model_type` to the type that it has for such a model."
    )


def _refuse_unknown_model(name: str, config: Any) -> None:
    """Refuse a type that Transformers has a config of, and no model for text."""
    if not has_model(config):
        own = config.auto_map["AutoModelForCausalLM"]
        lacks = f"Transformers builds no causal LM of type {config.model_type!r}"
        raise needs_code(name, f"{lacks}, and its config names {own}")
