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
from ..bad_input import BadInput
from ..models import load_model


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
        model = _model(name, trace, device or trace.facts.device, trust_remote_code)
        found = verify_trace(model, trace)
    except UnsupportedRouterError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except (OSError, RuntimeError, ValueError) as error:
        raise BadInput(f"trl-r3 verify: {error}") from error
    print(json.dumps(_as_json(found)) if as_json else found)
    return 0 if found.matches else 1


def _model(name: str, trace: Trace, device: str, trust_remote_code: bool) -> Any:
    """The model, computing as in the trace."""
    facts = trace.facts
    dtype = facts.dtype if isinstance(getattr(torch, facts.dtype, None), torch.dtype) else "auto"
    model = load_model(name, dtype, trust_remote_code=trust_remote_code).model
    if facts.model_type == model.config.model_type:  # else it will be refused
        model.set_attn_implementation(facts.attention)
        model.set_experts_implementation(facts.experts)
    return model.to(device)


def _as_json(found: TraceCheck) -> dict[str, Any]:
    """Numbers only; what is not a number is `null`."""
    values = {field.name: getattr(found, field.name) for field in fields(found) if field.repr}
    values = {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in values.items()}
    return {"matches": found.matches, **values}
