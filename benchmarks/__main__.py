"""`python -m benchmarks [gating | scale | padding | vllm | files | decides] [--smoke]`, from the root."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trl_r3.cli.bad_input import BadInput, check_writable


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a benchmark.

    Args:
        argv (sequence of `str`, *optional*):
            Arguments; those of the process by default.

    Returns:
        `int`: Exit status: 0 if every number is within its target, 1 if one is not, 2 for bad input.
    """
    args = _parser().parse_args(argv)
    if args.output is not None:
        try:
            check_writable(args.output.parent)
        except BadInput as error:
            print(error, file=sys.stderr)
            return 2
    part = args.part or "overhead"
    status = {
        "overhead": _overhead,
        "gating": _gating,
        "scale": _scale,
        "vllm": _vllm,
        "padding": _padding,
        "files": _files,
        "decides": _decides,
    }[part](args)
    return 0 if args.smoke and status == 1 else status  # no number of it is within a target, or outside


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What replay costs, and what it keeps.")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write the numbers to")
    smoke = {"action": "store_true", "help": "few tokens and repeats, to see that all of it runs: times mean nothing"}
    parser.add_argument("--smoke", **smoke)
    parts = parser.add_subparsers(dest="part")
    gating = parts.add_parser("gating", help="measure the gating op instead, on a GPU")
    gating.add_argument("--device", choices=("cpu", "cuda"), default=None, help="device to measure (default: cuda)")
    scale = parts.add_parser("scale", help="measure whether records cost the same a token from 1k to 32k tokens")
    vllm = parts.add_parser("vllm", help="measure what the capture of routes costs the vLLM that is installed")
    padding = parts.add_parser("padding", help="measure what is saved where layers see real tokens only")
    parts.add_parser("files", help="print the files of the package in which a training step with replay runs")
    decides = parts.add_parser("decides", help="train the case that replay decides, and what is below it: a CPU night")
    decides.add_argument("--redraw", action="store_true", help="run nothing: redraw the page from the runs there are")
    for part in (gating, scale, vllm, padding, decides):  # behind the name, too
        part.add_argument("--smoke", "--dry", default=argparse.SUPPRESS, **smoke)
    return parser


def _overhead(args: argparse.Namespace) -> int:
    from . import overhead
    from .setup import SMOKE

    findings = overhead.main(args.output, *[SMOKE] * args.smoke)
    return 1 if any(finding.met is False for finding in findings) else 0


def _gating(args: argparse.Namespace) -> int:
    from . import gating

    return gating.run(args.smoke, args.device)


def _scale(args: argparse.Namespace) -> int:
    from . import scale

    scale.run(args.output, *[scale.SMOKE] * args.smoke)
    return 0


def _vllm(args: argparse.Namespace) -> int:
    from . import vllm_capture

    vllm_capture.run(args.output, *[vllm_capture.SMOKE] * args.smoke)
    return 0


def _padding(args: argparse.Namespace) -> int:
    from . import padding
    from .setup import SMOKE

    findings = padding.run(SMOKE, rounds=1) if args.smoke else padding.run()
    return 1 if any(finding.met is False for finding in findings) else 0


def _files(args: argparse.Namespace) -> int:
    from . import files

    files.run()
    return 0


def _decides(args: argparse.Namespace) -> int:
    from .decides import run

    run.main(args.smoke, args.redraw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
