"""What is wrong with arguments by themselves, which is told before libraries are imported that take seconds."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from .bad_input import BadInput, first_line
from .plan.job import Job

_LOCAL = ("/", "./", "../", "~")  # no id on the Hub begins so
_DTYPES = ("auto", "float32", "bfloat16", "float16")  # taken without a look at PyTorch


def check_arguments(args: Namespace) -> None:
    """
    Refuse arguments that no run can begin with, whatever the model.

    Args:
        args (`argparse.Namespace`):
            Of any command.

    Raises:
        [`BadInput`]: Naming the argument.
    """
    if args.command == "demo":
        if args.mismatch == "noise" and args.model != "qwen3":
            raise BadInput(f"`--model {args.model}` is of the demo in bfloat16. Pass `--mismatch bf16` with it.")
        return
    if args.command == "report":
        if len(args.folders) > 2:
            raise BadInput(f"trl-r3 report: {len(args.folders)} folders, expected one run, or two to compare.")
        for folder in args.folders:
            check_run_folder(folder)
        return
    if args.model.startswith(_LOCAL) and not Path(args.model).expanduser().exists():
        raise BadInput(f"{args.model} cannot be loaded: there is no such folder. Pass one, or an id on the Hub.")
    if args.command == "plan":
        read_job(args)
    if args.command == "verify":
        check_engine_url(args.engine, args.url)
        if args.trace is not None and (args.engine, args.dtype) != ("transformers", "auto"):
            raise BadInput(
                "`--trace` replays a file in the dtype that it was made in, and lets no engine sample. Leave "
                "`--engine` and `--dtype` out, or `--trace`."
            )
        if args.trace is not None and not args.trace.is_file():
            raise BadInput(f"there is no trace {args.trace}. Pass a file that `routing_replay_trace_dir` holds.")
    if args.command in ("check", "verify") and args.dtype not in _DTYPES:
        parse_dtype(args.dtype)
    if args.command == "check" and args.device != "cpu":  # in a launch, `verify` takes none
        parse_device(args.device)


def read_job(args: Namespace) -> Job:
    """
    What `trl-r3 plan` is asked to plan.

    Raises:
        [`BadInput`]: If its settings do not fit each other.
    """
    return Job(**{name: value for name, value in vars(args).items() if name not in ("command", "model", "json")})


def check_run_folder(folder: Path) -> None:
    """A report is drawn of a folder that is there."""
    if not folder.is_dir():
        raise BadInput(
            f"trl-r3 report: {folder} is no folder. Pass the `output_dir` of a run, or its `routing_replay_trace_dir`."
        )


def check_engine_url(engine: str, url: str | None) -> None:
    """A server has an address, and nothing else has."""
    if (engine == "server") != (url is not None):
        raise BadInput("`--engine server` and `--url URL` belong together. Pass both, or neither.")


def parse_dtype(name: str) -> Any:
    """`"auto"`, or a torch dtype by its name."""
    import torch

    found = name if name == "auto" else getattr(torch, name, None)
    if not isinstance(found, (str, torch.dtype)):
        raise BadInput(f"`--dtype` is {name!r}, which is no torch dtype. Pass `auto`, `float32` or `bfloat16`.")
    return found


def parse_device(name: str) -> Any:
    """A device by its name, if it is here."""
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"`--device` is {name!r}, which is not here: {first_line(error)}.") from error
