"""What is released: one version, known classifiers, extras that exist, types, and the archives."""

import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import metadata, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from tools import check_wheel
from trove_classifiers import classifiers as known_classifiers

import bench_import
import modaldummy

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PUBLIC = (
    "modaldummy",
    "modaldummy.integrations.lightning",
    "modaldummy.integrations.transformers",
    "modaldummy.testing",
)


def citation() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    return found


def requirements() -> Iterator[Requirement]:
    """Of the core and of all extras, but for extras that name others of ours."""
    for requirement in [
        *PROJECT["dependencies"],
        *(line for own in PROJECT["optional-dependencies"].values() for line in own),
    ]:
        if not requirement.startswith("modaldummy["):
            yield Requirement(requirement)


def pins(file: str) -> dict[str, Version]:
    found = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements" / file).read_text(), re.M)
    return {canonicalize_name(name): Version(number) for name, number in found}


# --- Metadata ------------------------------------------------------------------------------------


def test_the_version_is_the_same_everywhere() -> None:
    """In the package, the citation, the newest entry of the changelog, and what is installed."""
    (newest, *_) = re.findall(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    found = {modaldummy.__version__, citation()["version"], newest, version("modaldummy")}
    assert len(found) == 1, found


def test_the_citation_says_what_the_metadata_say() -> None:
    """And no date of a release, as long as the changelog has none."""
    found = citation()
    assert found["cff-version"] == "1.2.0"
    assert found["title"] == PROJECT["name"]
    assert found["license"] == PROJECT["license"]
    assert found["keywords"] == PROJECT["keywords"]
    assert found["authors"] == PROJECT["authors"]
    (date,) = re.findall(
        rf"^## \[{modaldummy.__version__}\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert str(found.get("date-released", "not released yet")) == date


def test_classifiers_are_known_and_true() -> None:
    own = set(PROJECT["classifiers"])
    assert own <= known_classifiers
    pythons = {name.rpartition(" ")[2] for name in own if re.search(r":: 3\.\d+$", name)}
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert pythons
    assert all(Version(python) in allowed for python in pythons)
    assert ("Typing :: Typed" in own) == files("modaldummy").joinpath("py.typed").is_file()


def test_what_is_installed_has_the_licence() -> None:
    found = metadata("modaldummy")
    assert found["License-Expression"] == "MIT"
    assert found.get_all("License-File") == ["LICENSE"]


def test_extras_that_are_spoken_of_exist() -> None:
    """In pages, and in the messages of errors."""
    folder = Path(str(files("modaldummy")))
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *folder.rglob("*.py")]
    # As in "pip install modaldummy[demo]" or "pip install '.[demo,lightning]'".
    pattern = re.compile(r"(?:modaldummy|[ '`]\.)\[([a-z,]+)\]")
    named = {
        extra
        for path in texts
        for found in pattern.findall(path.read_text())
        for extra in found.split(",")
    }
    assert {"demo", "testing", "transformers", "lightning"} <= named
    assert named <= set(PROJECT["optional-dependencies"])


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    """So that an installation under the constraints is the same tomorrow."""
    pinned = pins("constraints.txt")
    wanted = {canonicalize_name(one.name): one.specifier for one in requirements()}
    assert {"torch", "numpy", "pytest", "transformers"} <= wanted.keys()
    assert wanted.keys() - pinned.keys() == set()
    assert {name for name, bounds in wanted.items() if pinned[name] not in bounds} == set()


def test_the_lowest_pins_are_the_floors() -> None:
    """`make test-lowest` tries the oldest torch and numpy that are admitted."""
    lowest = pins("lowest.txt")
    for requirement in map(Requirement, PROJECT["dependencies"]):
        (bound,) = requirement.specifier
        assert bound.operator == ">="
        assert lowest[requirement.name].release[:2] == (*Version(bound.version).release, 0)[:2]


# --- Types ---------------------------------------------------------------------------------------


def signatures(module: str) -> Iterator[tuple[str, inspect.Signature]]:
    """Of the public functions of a module, and of what its classes define themselves."""
    space = importlib.import_module(module)
    for name in space.__all__:
        value = getattr(space, name)
        if not inspect.isclass(value):
            yield name, inspect.signature(value)
            continue
        for own, member in vars(value).items():
            getter: Any = member.fget if isinstance(member, property) else member
            called = inspect.unwrap(getter)
            # Not what a dataclass generates.
            if inspect.isfunction(called) and Path(called.__code__.co_filename).is_file():
                yield f"{name}.{own}", inspect.signature(called)


@pytest.mark.parametrize("module", PUBLIC)
def test_public_functions_and_methods_are_annotated(module: str) -> None:
    """All parameters and results, private methods included."""
    found = dict(signatures(module))
    assert found
    bare = inspect.Parameter.empty
    lacking = [
        f"{name}({parameter.name})"
        for name, signature in found.items()
        for place, parameter in enumerate(signature.parameters.values())
        if parameter.annotation is bare and not (place == 0 and parameter.name in ("self", "cls"))
    ]
    lacking += [name for name, one in found.items() if one.return_annotation is bare]
    assert lacking == []


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_a_test_of_its_type(module: str) -> None:
    """`typing_tests` use it, beyond importing it."""
    used = "".join(path.read_text() for path in ROOT.glob("typing_tests/*.py"))
    names = importlib.import_module(module).__all__
    once = [name for name in names if len(re.findall(rf"\b{name}\b", used)) < 2]
    assert once == []


# --- Archives ------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (ROOT / ".git").exists() or not (ROOT / "src").is_dir(), reason="needs a checkout"
)
def test_wheel_and_sdist_hold_what_they_should(tmp_path: Path) -> None:
    """Nothing more and nothing less, and the sdist makes the same wheel, byte for byte."""
    sdist, wheel = check_wheel.build(ROOT, tmp_path / "dist", isolated=False)
    check_wheel.check_archives(sdist, wheel, tmp_path, isolated=False)


@pytest.mark.parametrize(
    ("found", "said"),
    [({"a", "b"}, "it also has ['b']"), (set[str](), "it lacks ['a']")],
    ids=["one more", "one less"],
)
def test_a_difference_is_named(found: set[str], said: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(said)):
        check_wheel.compare("it", found, {"a"})


# --- Import --------------------------------------------------------------------------------------


def test_the_benchmark_of_the_import_takes_our_part_of_the_log() -> None:
    """What the import loads behind torch and numpy, ours or not, and nothing of theirs."""
    lines = ["10 | 10 |   torch._C", "20 | 30 | torch", "5 | 5 | numpy", "3 | 3 |   numpy.typing"]
    lines += ["2 | 2 |     modaldummy._a", "1 | 3 |   modaldummy._b", "4 | 10 | modaldummy"]
    log = "".join(f"import time: {line}\n" for line in lines)
    assert dict(bench_import.own_times(log)) == pytest.approx(
        {
            "numpy.typing": 3e-6,
            "modaldummy._a": 2e-6,
            "modaldummy._b": 1e-6,
            "modaldummy": 4e-6,
        }
    )
    with pytest.raises(ValueError, match=r"last module is `numpy\.typing`"):
        list(bench_import.own_times("".join(log.splitlines(keepends=True)[:4])))
