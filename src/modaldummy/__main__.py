"""Command line: `python -m modaldummy demo`."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

_DEMO_PACKAGES = ("nibabel", "dipy", "matplotlib", "rich")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = _parser().parse_args(argv)
    if missing := [name for name in _DEMO_PACKAGES if find_spec(name) is None]:
        names = " and ".join(missing)
        print(f"The demo needs {names}: pip install 'modaldummy[demo]'", file=sys.stderr)
        return 2
    from modaldummy.demo.command import run

    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m modaldummy", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train a three-modality model on real scans")
    demo.add_argument("--steps", type=_count, default=200, help="training steps (default: 200)")
    demo.add_argument(
        "--seed", type=_seed, default=0, help="of weights, batches, masks (default: 0)"
    )
    demo.add_argument("--no-dummy", action="store_true", help="train without the wrapper")
    demo.add_argument(
        "--out",
        type=Path,
        help="folder to write to (default: demo-output, or demo-output-no-dummy)",
    )
    demo.add_argument(
        "--modalities",
        nargs="+",
        choices=("T1", "rsfMRI", "dMRI"),
        help="modalities that batches hold; the model always has all three (default: all)",
    )
    return parser


def _count(text: str) -> int:
    return _whole(text, 1)


def _seed(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or not least <= int(text) < 2**63:
        expected = f"a whole number of at least {least} and below 2**63"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
