"""Load the model that a command was given: a folder with weights, an id on the Hub, or a LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._compat import is_causal_lm
from ..routers.discovery import refuse_dense
from ..routers.self_check import UnsupportedRouterError
from .arguments import parse_device, parse_dtype
from .bad_input import BadInput, first_line
from .configs import needs_code, read_config, refuse_missing_folder
from .quantization import is_unreadable, quantization_note


@dataclass
class LoadedModel:
    """
    A model and where it comes from.

    Args:
        model (`torch.nn.Module`):
            In evaluation mode.
        origin (`str`):
            Which weights it has.
        forward (`Callable`, *optional*):
            What training calls instead, where it has wrapped the model.
        sharding (`str`, *optional*):
            What has sharded the weights.
        quantization (`str`, *optional*):
            What training makes of weights that are stored quantized.
    """

    model: Any
    origin: str
    forward: Callable | None = None
    sharding: str | None = None
    quantization: str | None = None

    def __call__(self, **kwargs: Any) -> Any:
        """One forward, as in training."""
        return (self.forward or self.model)(**kwargs)


def load_model(
    name: str,
    dtype: str = "auto",
    device: str | None = "cpu",
    *,
    downloads: bool = True,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """
    Load a causal LM by its id or folder, one behind a vision tower included, or an adapter on top of its base.

    Args:
        name (`str`):
            Id on the Hugging Face Hub, or a local folder.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, or the name of a torch dtype.
        device (`str`, *optional*, defaults to `"cpu"`):
            Device to load it on; `None` leaves it where the loader puts it.
        downloads (`bool`, *optional*, defaults to `True`):
            Whether weights that are not on this machine are downloaded.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the checkpoint is run.

    Returns:
        [`LoadedModel`].

    Raises:
        [`BadInput`]: If there is no such model, dtype or device, or if it is dense.
        `OSError`: If `downloads` is off and the weights are not on this machine.
    """
    torch_dtype, place = parse_dtype(dtype), None if device is None else parse_device(device)
    base = adapter_base(name)
    try:
        model = _from_pretrained(base or name, torch_dtype, downloads, trust_remote_code)
        note = quantization_note(load_config(base or name, trust_remote_code))  # the model's forgets what is undone
        if base is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, name)
        model = (model if place is None else model.to(place)).eval()
    except BadInput:
        raise
    except OSError as error:
        if not downloads:
            raise
        raise BadInput(_unloadable(name, error)) from error
    except Exception as error:  # what a broken file raises depends on what reads it
        raise BadInput(_unloadable(name, error)) from error
    refuse_dense_model(model)
    origin = "the weights of" if base is None else f"{base} with the adapter"
    return LoadedModel(model, f"{origin} {name}", quantization=note)


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """
    The config of a model by its id or folder.

    Raises:
        [`BadInput`]: If there is none, or as [`~trl_r3.cli.configs.read_config`].
    """
    try:
        return read_config(name, trust_remote_code)
    except BadInput:
        raise
    except Exception as error:  # what a broken file raises depends on what reads it
        raise BadInput(_unloadable(name, error)) from error


def refuse_dense_model(model: Any) -> None:
    """
    Refuse a model without experts.

    Raises:
        [`BadInput`]: Naming it.
    """
    try:
        refuse_dense(model)
    except UnsupportedRouterError as error:
        fact = str(error).partition(" There is no routing")[0]
        raise BadInput(f"{fact} There is nothing to replay; pass a mixture of experts.") from error


def adapter_base(name: str) -> str | None:
    """The model that an adapter was trained on, or `None` where `name` is a model itself."""
    from transformers.utils import find_adapter_config_file

    refuse_missing_folder(name)
    folder = Path(name)
    if (folder / "config.json").exists() or (folder.exists() and not (folder / "adapter_config.json").exists()):
        return None
    try:
        if find_adapter_config_file(name) is None:
            return None
        from peft import PeftConfig

        return PeftConfig.from_pretrained(name).base_model_name_or_path
    except (OSError, ValueError, TypeError) as error:
        if folder.exists():
            raise BadInput(_unloadable(name, error)) from error
        return None  # what is wrong with the name, the model's own loader tells


def _unloadable(name: str, error: Exception) -> str:
    if "trust_remote_code=True" in str(error):  # of parts that no config names
        return str(needs_code(name, first_line(error)))
    return f"{name} cannot be loaded: {first_line(error)}. Pass a folder with a model, or its id on the Hub."


def _from_pretrained(name: str, dtype: Any, downloads: bool, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = load_config(name, trust_remote_code)
    if is_unreadable(config):
        raise BadInput(f"{name} cannot be loaded. {quantization_note(config)}")
    auto = AutoModelForCausalLM if is_causal_lm(config) else AutoModelForImageTextToText
    return auto.from_pretrained(name, dtype=dtype, local_files_only=not downloads, trust_remote_code=trust_remote_code)
