"""Builds what would be released and tries it as users get it: `python -m tools.check_wheel`.

Three steps: wheel and sdist are built and compared; the wheel alone is tried beside torch and
numpy; and the suite of the sdist, without its sources, is run against the wheel. What stands behind
`--` goes to pytest, such as `-- tests/core/test_term.py -x`. Everything lies in a temporary folder.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "requirements/constraints.txt"
MAX_WHEEL_BYTES = 200_000  # code and docstrings; a picture or a data file would be noticed
_LIMIT = 3600  # seconds for one command; the suite is the longest

_SMOKE = """
import sys, torch, modaldummy
from pathlib import Path
assert Path(modaldummy.__file__).is_relative_to(sys.prefix), modaldummy.__file__
model = torch.nn.ModuleDict({"T1": torch.nn.Linear(4, 2), "dMRI": torch.nn.Linear(6, 2)})
wrapper = modaldummy.DummyLossWrapper(model, {"T1": "T1", "dMRI": "dMRI"})
batch = {"T1": torch.ones(3, 4)}
wrapper.total(model["T1"](batch["T1"]).square().mean(), batch).backward()
assert all(parameter.grad is not None for parameter in model.parameters())
assert modaldummy.missing_gradients(wrapper) == {}
"""
# What a user types in an environment without extras, and what has to be said then.
NEEDS = {
    "-m modaldummy demo": "pip install nibabel dipy matplotlib rich",
    "-c import=modaldummy.testing": "pip install hypothesis",
    "-c import=modaldummy.integrations.lightning": "pip install lightning",
    "-c import=modaldummy.integrations.transformers": "pip install transformers accelerate",
}


def main() -> None:
    """Run all steps, or stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--until", choices=("build", "bare", "suite"), default="suite")
    parser.add_argument("pytest", nargs="*", help="paths and options, after --; by default all")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="modaldummy-") as name:
        place = Path(name)
        _say("building")
        sdist, wheel = build(ROOT, place / "dist")
        check_archives(sdist, wheel, place)
        run([sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)], place)
        if arguments.until == "build":
            return
        _say("trying the wheel beside torch and numpy")
        check_bare(wheel, place)
        if arguments.until == "bare":
            return
        _say("running the suite of the sdist against the wheel")
        run_suite(sdist, wheel, place, arguments.pytest)


def build(source: Path, to: Path, *kinds: str) -> tuple[Path, Path]:
    """Build sdist and wheel of a source tree, each from the tree, and return their paths.

    Args:
        source: The tree, or an unpacked sdist.
        to: Folder for both, made if it is not there.
        *kinds: `--sdist` or `--wheel`; both by default.
    """
    options = list(kinds or ("--sdist", "--wheel"))
    run([sys.executable, "-m", "build", *options, "--outdir", str(to), str(source)], to.parent)
    return next(iter(to.glob("*.tar.gz")), to), next(iter(to.glob("*.whl")), to)


def check_archives(sdist: Path, wheel: Path, place: Path) -> None:
    """The wheel is the package, the same from the sdist, and the sdist is what git knows.

    Raises:
        AssertionError: It is not so; the message names files.
    """
    package, about = wheel_files(wheel)
    source = ROOT / "src"
    expected = {
        path.relative_to(source).as_posix() for path in tracked(ROOT) if path.is_relative_to(source)
    }
    compare("the wheel", package, expected)
    compare("its metadata", about, {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"})
    size = wheel.stat().st_size
    assert size <= MAX_WHEEL_BYTES, f"the wheel has {size} bytes, more than {MAX_WHEEL_BYTES}"
    unpacked = unpack(sdist, place / "unpacked")
    inside = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    known = {path.relative_to(ROOT).as_posix() for path in tracked(ROOT)}
    compare("the sdist", inside, known | {"PKG-INFO"})
    _, again = build(unpacked, place / "again", "--wheel")
    assert again.read_bytes() == wheel.read_bytes(), "the sdist makes another wheel than the tree"
    print(f"{wheel.name}: {size} bytes, {len(package)} files; {sdist.name}: {len(inside)} files")


def compare(what: str, found: set[str], expected: set[str]) -> None:
    """Raise an AssertionError that says which files are missing, or too many."""
    missing, more = sorted(expected - found), sorted(found - expected)
    assert not missing, f"{what} lacks {missing}"
    assert not more, f"{what} also has {more}"


def wheel_files(wheel: Path) -> tuple[set[str], set[str]]:
    """Files of the package, and those of its metadata without the folder."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    folder = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/"
    about = {name.removeprefix(folder) for name in names if name.startswith(folder)}
    return {name for name in names if not name.startswith(folder)}, about


def tracked(root: Path) -> set[Path]:
    """Files that git knows or would take, but for those that were removed."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return {path for name in done.stdout.split("\0") if name and (path := root / name).is_file()}


def unpack(sdist: Path, to: Path) -> Path:
    """The one folder in an sdist."""
    with tarfile.open(sdist) as archive:
        archive.extractall(to, filter="data")
    return to / sdist.name.removesuffix(".tar.gz")


def check_bare(wheel: Path, place: Path) -> None:
    """With torch and numpy alone a step can be trained, and whatever needs more says what."""
    python = environment(place / "bare", str(wheel))
    run([python, "-c", _SMOKE], place)
    run([python, "-m", "modaldummy", "info"], place)
    for command, expected in NEEDS.items():
        words = [word.replace("=", " ") for word in command.split(" ")]
        done = subprocess.run(
            [python, *words], cwd=place, capture_output=True, text=True, timeout=_LIMIT
        )
        assert done.returncode, f"`python {' '.join(words)}` should have failed"
        assert expected in done.stderr, f"{expected!r} is not in:\n{done.stderr}"


def run_suite(sdist: Path, wheel: Path, place: Path, options: Sequence[str]) -> None:
    """The tests of the sdist, with no sources beside them: of types, all others, and doctests."""
    python = environment(place / "full", f"modaldummy[dev] @ {wheel.as_uri()}")
    folder = unpack(sdist, place / "suite")
    shutil.rmtree(folder / "src")
    run([python, "-c", _SMOKE], folder)
    run([python, "-m", "mypy"], folder / "typing_tests")
    workers = ["--numprocesses", "auto", "--dist", "loadgroup"]
    chosen = list(options) or ["tests", "--pyargs", "modaldummy", *workers]
    run([python, "-m", "pytest", *chosen], folder)


def environment(place: Path, requirement: str) -> str:
    """The interpreter of a new virtual environment with what is required, under the constraints."""
    run([sys.executable, "-m", "venv", str(place)], place.parent)
    python = str(place / "bin/python")
    run([python, "-m", "pip", "install", "--quiet", requirement], place.parent)
    return python


def run(command: Sequence[str], folder: Path) -> None:
    """Run a command there, in which only the constraints reach pip; stop where it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    # Nothing of this checkout may be found by an import.
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    variables["PIP_CONSTRAINT"] = str(CONSTRAINTS)
    code = subprocess.run(command, cwd=folder, env=variables, timeout=_LIMIT).returncode
    if code:
        sys.exit(f"`{' '.join(command)}` exited with {code}.")


def _say(what: str) -> None:
    print(f"--- {what}", flush=True)


if __name__ == "__main__":
    main()
