"""Compares the bits of two versions of fastloss: values, metrics and gradients of seeded calls of every public function.

    PYTHONPATH=<one checkout> python tools/compare_bits make before.pt
    PYTHONPATH=<another checkout> python tools/compare_bits make after.pt
    python tools/compare_bits compare before.pt after.pt

``make`` runs the calls on every backend that can run here: the definition, the CPU kernels (each instruction set that this
machine has, one thread and two), the CUDA kernels emulated on the CPU and the Triton kernels in Triton's interpreter (both:
fewer and smaller calls), a few of them under torch.compile, under autocast, and differentiated twice. ``compare`` lists every
call of which a bit differs, with the largest difference, and ends with 1 if there is one.

It uses public names alone, so that it runs against any version: this file need not be part of the checkout that is measured.
What is not public stands in ``instruction_sets`` and ``emulate_cuda``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Before torch and triton are imported. MKL may sum in another order at another address of its operands.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

from results import compare
from running import make


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "make", help="run the calls with the fastloss on the path and keep what they give"
    )
    command.add_argument("out", type=Path)
    command.add_argument("--backends", default="auto,reference,cpu,cuda,triton")
    command.add_argument(
        "--only", action="append", help="a pattern of function:name, such as 'linear_*'; again for more"
    )
    command = commands.add_parser("compare", help="list the calls of which a bit differs")
    command.add_argument("before", type=Path)
    command.add_argument("after", type=Path)
    command.add_argument("--show", type=int, default=40, help="how many calls to print in full; 0: all")
    command.add_argument(
        "--only", action="append", help="a pattern of setting|function|name|dtype; again for more"
    )
    args = parser.parse_args()
    if args.command == "make":
        return make(args.out, args.backends.split(","), args.only or ["*"])
    return compare(args.before, args.after, args.show, args.only or ["*"])


if __name__ == "__main__":
    sys.exit(main())
