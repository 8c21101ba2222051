"""The command `trl-r3`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from .arguments import check_arguments, read_job
from .bad_input import BadInput, check_writable


def build_parser() -> argparse.ArgumentParser:
    """All subcommands and their options."""
    parser = argparse.ArgumentParser(
        prog="trl-r3",
        description="Rollout Routing Replay (R3) for TRL.",
        epilog="Exit status: 0 it works, matches, fits or is healthy; 1 it ran, but a check failed; 2 bad input.",
    )
    parser.add_argument("--version", action="version", version=f"trl-r3 {__version__}")
    commands = parser.add_subparsers(dest="command")
    for add in (_add_demo, _add_check, _add_verify, _add_plan, _add_report):
        add(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="train a small mixture of experts on this CPU, without replay and with it")
    demo.add_argument(
        "--mismatch",
        choices=("noise", "bf16"),
        default="noise",
        help="how rollouts differ from training: noise in the choice of experts, so that live routing stalls, or "
        "bfloat16, where both ways learn alike (default: noise)",
    )
    demo.add_argument(
        "--model", choices=("qwen3", "mixtral"), default="qwen3", help="architecture, with bf16 (default: qwen3)"
    )
    demo.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("trl_r3_demo"),
        help="folder for table, plot and log (default: %(default)s)",
    )


def _add_check(commands: Any) -> None:
    check = commands.add_parser("check", help="say whether the routing of a model can be replayed, and try it")
    check.add_argument("model", help="id on the Hugging Face Hub, or a local folder")
    check.add_argument("--dtype", default="auto", help="dtype to load it in (default: that of the checkpoint)")
    check.add_argument("--device", default="cpu", help="device to load it on (default: cpu)")
    _add_trust(check)
    check.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser("verify", help="let an engine sample, and hold its routes against training")
    verify.add_argument("model", help="id on the Hugging Face Hub, a local folder, or that of a LoRA adapter")
    verify.add_argument(
        "--engine",
        choices=("transformers", "continuous", "vllm", "server"),
        default="transformers",
        help="what samples (default: transformers)",
    )
    verify.add_argument("--url", default=None, help="of the vLLM server, with --engine server")
    verify.add_argument("--trace", type=Path, default=None, help="a trace of a run to replay, instead of an engine")
    verify.add_argument("--dtype", default="auto", help="dtype to load it in (default: that of the checkpoint)")
    verify.add_argument("--device", default=None, help="of the training forward (default: cpu, or that of the trace)")
    _add_trust(verify)
    verify.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser("plan", help="say whether a job fits its GPUs and hosts, from the config of its model")
    plan.add_argument("--model", required=True, help="id on the Hugging Face Hub, or a folder with a config.json")
    plan.add_argument("--prompts", type=int, required=True, help="prompts of a rollout")
    plan.add_argument("--generations", type=int, default=8, help="completions of a prompt (default: %(default)s)")
    plan.add_argument("--tokens", type=int, default=4096, help="tokens of a sample (default: %(default)s)")
    plan.add_argument("--micro-batch", type=int, default=1, help="samples of a forward (default: %(default)s)")
    plan.add_argument("--gpus", type=int, default=1, help="processes (default: %(default)s)")
    plan.add_argument("--gpus-per-host", type=int, default=8, help="of them on a host (default: %(default)s)")
    plan.add_argument("--strategy", default="ddp", help="ddp, fsdp2, zero2, zero3 or lora (default: %(default)s)")
    plan.add_argument("--lora-rank", type=int, default=0, help="rank of adapters, with any strategy (default: none)")
    plan.add_argument(
        "--lora-target-modules",
        default="q_proj,k_proj,v_proj,o_proj",
        help="with adapters, split by commas, or all-linear (default: %(default)s)",
    )
    plan.add_argument("--load-in-4bit", action="store_true", help="let bitsandbytes quantize the base of LoRA")
    plan.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the loaded weights")
    plan.add_argument("--gpu-memory", type=float, default=80.0, help="GB of a GPU (default: %(default)s)")
    plan.add_argument("--host-memory", type=float, default=512.0, help="GB of a host (default: %(default)s)")
    plan.add_argument(
        "--reserve", type=float, default=0.15, help="share of a GPU for activations and logits (default: %(default)s)"
    )
    plan.add_argument(
        "--engine-share", type=float, default=0.0, help="share of a GPU for a colocated vLLM (default: %(default)s)"
    )
    plan.add_argument(
        "--engine-tensor-parallel", type=int, default=1, help="GPUs that split its weights (default: %(default)s)"
    )
    plan.add_argument(
        "--bandwidth", type=float, default=25.0, help="GB a second from host to device (default: %(default)s)"
    )
    plan.add_argument(
        "--beta", type=float, default=0.0, help="TRL's `beta`; above 0 a reference model counts (default: %(default)s)"
    )
    plan.add_argument(
        "--spill",
        action="store_true",
        help="with `routing_replay_spill_dir`: records in files while they are trained on",
    )
    plan.add_argument(
        "--queue",
        type=int,
        default=0,
        help="samples in the queue of asynchronous GRPO, TRL's `queue_maxsize` (default: %(default)s, synchronous)",
    )
    _add_trust(plan)
    plan.add_argument("--json", action="store_true", help="print JSON")


def _add_report(commands: Any) -> None:
    report = commands.add_parser("report", help="say whether a run is healthy, by its traces and log, and draw it")
    report.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="folder",
        help="the `output_dir` of a run, or a folder with traces; two are compared",
    )
    written = report.add_mutually_exclusive_group()
    written.add_argument("--output", type=Path, default=None, help="folder to write to (default: inside the first)")
    written.add_argument("--json", action="store_true", help="print verdict and numbers as JSON, and draw nothing")


def _add_trust(command: Any) -> None:
    command.add_argument(
        "--trust-remote-code",
        "--trust_remote_code",  # as TRL's scripts spell it
        action="store_true",
        help="run code that comes with the checkpoint, where its config names some (default: refuse it)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a subcommand.

    Args:
        argv (sequence of `str`, *optional*):
            Arguments; those of the process by default.

    Returns:
        `int`: Exit status: 0 if all is well, 1 if it ran but a check failed, 2 for bad input, which is told
        in one sentence.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    try:
        check_arguments(args)
        return _run(args)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    commands = {"demo": _demo, "check": _check, "plan": _plan, "verify": _verify, "report": _report}
    return commands[args.command](args)


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    check_writable(args.output)
    demo.main(args.mismatch, args.model, args.smoke, args.output)
    return 0


def _check(args: argparse.Namespace) -> int:
    from . import check

    return check.main(args.model, args.dtype, args.device, args.json, args.trust_remote_code)


def _verify(args: argparse.Namespace) -> int:
    from . import verify

    if args.trace is not None:
        from .verify import from_trace

        return from_trace.main(args.model, args.trace, args.device, args.json, args.trust_remote_code)
    return verify.main(args.model, args.engine, args.url, args.dtype, args.device, args.json, args.trust_remote_code)


def _plan(args: argparse.Namespace) -> int:
    from .plan import planning

    return planning.main(args.model, args.json, read_job(args))


def _report(args: argparse.Namespace) -> int:
    from . import report

    return report.main(args.folders, args.output, args.json)


if __name__ == "__main__":
    sys.exit(main())
