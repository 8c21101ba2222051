"""`trl-r3 verify MODEL --trace FILE`: a trace, replayed offline on a model with the weights of its step."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ...routers.self_check import UnsupportedRouterError
from ...traces.trace import Trace
from ...traces.trace_file import load_trace
from ...traces.trace_replay import TraceCheck, verify_trace
from ..arguments import parse_device
from ..bad_input import BadInput, first_line
from ..models import load_model

_LOADED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def main(
    name: str, path: Path, device: str | None = None, as_json: bool = False, trust_remote_code: bool = False
) -> int:
    """
    Replay a trace and print whether its log-probabilities come back.

    Args:
        name (`str`):
            Id on the Hugging Face Hub, or a local folder: the model with the weights of the step of the trace.
        path (`Path`):
            The trace.
        device (`str`, *optional*):
            Device to load the model on; that of the trace by default.
        as_json (`bool`, *optional*, defaults to `False`):
            Whether to print JSON.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the checkpoint is run.

    Returns:
        `int`: Exit status: 0 if every bit comes back, 1 if one does not.

    Raises:
        [`BadInput`]: If the file is no trace, or one of another model, or the model cannot be loaded.
    """
    try:
        trace = load_trace(path)
        model = _model(name, trace, _place(trace, device), trust_remote_code)
        found = verify_trace(model, trace)
    except UnsupportedRouterError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        raise BadInput(
            f"the trace was made with attention {trace.facts.attention} and experts {trace.facts.experts}, which do "
            f"not load here: {first_line(error)}. Replay it where they are installed."
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise BadInput(f"trl-r3 verify: {error}") from error
    print(json.dumps(_as_json(found)) if as_json else found)
    return 0 if found.matches else 1


def _place(trace: Trace, device: str | None) -> torch.device:
    """The device that was asked for, or that of the trace, before minutes of loading."""
    try:
        return parse_device(device or trace.facts.device)
    except BadInput as error:
        if device is not None:
            raise
        raise BadInput(
            f"the trace was made on {trace.facts.device}, which is not here. Replay it where it was made, or pass "
            "`--device cpu`, where bits differ."
        ) from error


def _loaded_dtype(said: str) -> str:
    """In what to load: beside float32, of adapters or of what a model keeps in it, the other one tells."""
    names = said.split(", ")
    below = [name for name in names if name != "float32"] or names
    dtype = getattr(torch, below[0], None)
    return below[0] if len(below) == 1 and dtype in _LOADED else "auto"


def _model(name: str, trace: Trace, device: torch.device, trust_remote_code: bool) -> Any:
    """The model, computing as in the trace."""
    facts = trace.facts
    model = load_model(name, _loaded_dtype(facts.dtype), trust_remote_code=trust_remote_code).model
    if facts.model_type == model.config.model_type:  # else it will be refused
        model.set_attn_implementation(facts.attention)
        model.set_experts_implementation(facts.experts)
    return model.to(device)


def _as_json(found: TraceCheck) -> dict[str, Any]:
    """Numbers only; what is not a number is `null`."""
    values = {field.name: getattr(found, field.name) for field in fields(found) if field.repr}
    values = {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in values.items()}
    return {"matches": found.matches, **values}
