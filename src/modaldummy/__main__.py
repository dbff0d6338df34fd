"""Command line: `python -m modaldummy demo | doctor | info`."""

import argparse
import functools
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from modaldummy._core.reduce import kernels_for
from modaldummy._diagnose import doctor

_DEMO_PACKAGES = ("nibabel", "dipy", "matplotlib", "rich")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed the pipe
        # Python flushes stdout again at exit, which must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # the exit code that shells report for SIGPIPE
    return code


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "info":
        print(*_info(), sep="\n")
        return 0
    if arguments.command == "doctor":
        return doctor.run(arguments)
    if missing := [name for name in _DEMO_PACKAGES if find_spec(name) is None]:
        names = " and ".join(missing)
        print(f"The demo needs {names}: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    from modaldummy.demo.command import run

    return run(arguments)


def _info() -> Iterator[str]:
    """Lines with the installed versions, and with what reduces tensors on each device."""
    for package in ("modaldummy", "torch", "numpy", "triton"):
        yield f"{package:12}{_version(package)}"
    yield f"{'python':12}{platform.python_version()}"
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        try:
            reduction = "plain torch" if kernels_for(device) is None else "fused Triton kernels"
        except ValueError as error:
            reduction = str(error)
        yield f"{device!s:12}{reduction}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed" if find_spec(package) is None else "not installed, but importable"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m modaldummy", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    commands.add_parser("info", help="versions, and what reduces tensors on each device")
    doctor.add_arguments(commands.add_parser("doctor", help="check the logged metrics of a run"))
    demo = commands.add_parser("demo", help="train a three-modality model on real scans")
    steps = functools.partial(_whole_number, minimum=1)
    demo.add_argument("--steps", type=steps, default=200, help="training steps (default: 200)")
    seeded = "seed of weights, batches and masks (default: 0)"
    demo.add_argument("--seed", type=_whole_number, default=0, help=seeded)
    demo.add_argument("--no-dummy", action="store_true", help="train without the wrapper")
    written = "folder to write to (default: demo-output, or demo-output-no-dummy)"
    demo.add_argument("--out", type=Path, help=written)
    present = "modalities that batches contain; the model always has all three (default: all)"
    names = ("T1", "rsfMRI", "dMRI")
    demo.add_argument("--modalities", nargs="+", choices=names, help=present)
    return parser


def _whole_number(text: str, minimum: int = 0) -> int:
    if not text.isdecimal() or not minimum <= int(text) < 2**63:
        expected = f"a whole number of at least {minimum} and below 2**63"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
