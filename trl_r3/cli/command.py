"""The command `trl-r3`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .bad_input import BadInput, check_writable


def build_parser() -> argparse.ArgumentParser:
    """All subcommands and their options."""
    parser = argparse.ArgumentParser(
        prog="trl-r3",
        description="Rollout Routing Replay (R3) for TRL.",
        epilog="Exit status: 0 right; 1 it ran and something does not hold; 2 bad input.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="train a small mixture of experts on this CPU, without replay and with it")
    demo.add_argument("--model", choices=("qwen3", "mixtral"), default="qwen3", help="architecture (default: qwen3)")
    demo.add_argument("--smoke", action="store_true", help="a few steps only, to see that everything runs")
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("trl_r3_demo"),
        help="folder for table, plot and log (default: %(default)s)",
    )

    check = commands.add_parser("check", help="say whether the routing of a model can be replayed, and try it")
    check.add_argument("model", help="id on the Hugging Face Hub, or a local folder")
    check.add_argument("--dtype", default="auto", help="dtype to load it in (default: that of the checkpoint)")
    check.add_argument("--device", default="cpu", help="device to load it on (default: cpu)")

    verify = commands.add_parser("verify", help="let an engine sample, and hold its routes against training")
    verify.add_argument("model", help="id on the Hugging Face Hub, a local folder, or that of a LoRA adapter")
    verify.add_argument(
        "--engine",
        choices=("transformers", "continuous", "vllm", "server"),
        default="transformers",
        help="what samples (default: transformers)",
    )
    verify.add_argument("--url", default=None, help="of the vLLM server, with --engine server")
    verify.add_argument("--dtype", default="auto", help="dtype to load it in (default: that of the checkpoint)")
    verify.add_argument("--device", default="cpu", help="device of the training forward (default: cpu)")
    verify.add_argument("--json", action="store_true", help="print JSON instead of a table")

    bench = commands.add_parser("bench", help="measure what replay costs on this CPU, and what it keeps")
    bench.add_argument("--output", type=Path, default=None, help="JSON file to write the numbers to")
    parts = bench.add_subparsers(dest="part")
    gating = parts.add_parser("gating", help="measure the gating op instead, on a GPU")
    gating.add_argument("--dry", action="store_true", help="few tokens and repeats: the times mean nothing")
    gating.add_argument("--device", choices=("cpu", "cuda"), default=None, help="device to measure (default: cuda)")

    report = commands.add_parser("report", help="draw what a run's traces and log say about its routing")
    report.add_argument("folder", type=Path, help="the `output_dir` of a run, or a folder with traces")
    report.add_argument("--output", type=Path, default=None, help="folder to write to (default: inside the first)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a subcommand.

    Args:
        argv (sequence of `str`, *optional*):
            Arguments; those of the process by default.

    Returns:
        `int`: Exit status: 0 if all is right, 1 if it ran and something does not hold, 2 for bad input, which is told
        in one sentence.
    """
    args = build_parser().parse_args(argv)
    try:
        return _run(args)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    return {"demo": _demo, "check": _check, "verify": _verify, "bench": _bench, "report": _report}[args.command](args)


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    check_writable(args.output)
    demo.main(args.model, args.smoke, args.output)
    return 0


def _check(args: argparse.Namespace) -> int:
    from . import check

    return check.main(args.model, args.dtype, args.device)


def _verify(args: argparse.Namespace) -> int:
    from . import verify

    return verify.main(args.model, args.engine, args.url, args.dtype, args.device, args.json)


def _bench(args: argparse.Namespace) -> int:
    if args.part == "gating":
        from .bench import gating

        return gating.run(args.dry, args.device)
    from . import bench

    if args.output is not None:
        check_writable(args.output.parent)
    findings = bench.main(args.output)
    return 1 if any(finding.met is False for finding in findings) else 0


def _report(args: argparse.Namespace) -> int:
    from . import report

    return report.main(args.folder, args.output)


if __name__ == "__main__":
    sys.exit(main())
