"""`python -m benchmarks [gating | scale | padding | vllm | files]`, from the root of a checkout."""

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
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What replay costs, and what it keeps.")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write the numbers to")
    parts = parser.add_subparsers(dest="part")
    gating = parts.add_parser("gating", help="measure the gating op instead, on a GPU")
    gating.add_argument("--dry", action="store_true", help="few tokens and repeats: the times mean nothing")
    gating.add_argument("--device", choices=("cpu", "cuda"), default=None, help="device to measure (default: cuda)")
    parts.add_parser("scale", help="measure whether records cost the same a token from 1k to 32k tokens a sequence")
    parts.add_parser("vllm", help="measure what the capture of routes costs the vLLM that is installed")
    parts.add_parser("padding", help="measure what is saved where layers see real tokens only")
    parts.add_parser("files", help="print the files of the package in which a training step with replay runs")
    args = parser.parse_args(argv)
    if args.part == "gating":
        from . import gating as of_the_op

        return of_the_op.run(args.dry, args.device)
    if args.part == "scale":
        from . import scale

        scale.run(args.output)
        return 0
    if args.part == "vllm":
        from . import vllm_capture

        vllm_capture.run(args.output)
        return 0
    if args.part == "padding":
        from . import padding

        return 1 if any(finding.met is False for finding in padding.run()) else 0
    if args.part == "files":
        from . import files

        files.run()
        return 0
    from . import overhead

    if args.output is not None:
        try:
            check_writable(args.output.parent)
        except BadInput as error:
            print(error, file=sys.stderr)
            return 2
    findings = overhead.main(args.output)
    return 1 if any(finding.met is False for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
