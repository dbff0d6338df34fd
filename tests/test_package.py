"""What is released: one version, extras that exist, and types that are tried."""

import importlib
import re
import tomllib
from importlib.metadata import metadata, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import modaldummy

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PUBLIC = (
    "modaldummy",
    "modaldummy.integrations.lightning",
    "modaldummy.integrations.transformers",
    "modaldummy.testing",
)


def test_the_version_is_the_same_everywhere() -> None:
    """In the package, the citation, the newest entry of the changelog, and what is installed."""
    (newest, *_) = re.findall(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    (cited,) = re.findall(r"^version: \"?([^\s\"]+)", (ROOT / "CITATION.cff").read_text(), re.M)
    found = {modaldummy.__version__, cited, newest, version("modaldummy")}
    assert len(found) == 1, found


def test_what_is_installed_has_types_and_a_licence() -> None:
    found = metadata("modaldummy")
    assert found["License-Expression"] == "MIT"
    assert found.get_all("License-File") == ["LICENSE"]
    assert files("modaldummy").joinpath("py.typed").is_file()


def test_extras_that_are_spoken_of_exist() -> None:
    """In pages, and in the messages of errors."""
    folder = Path(str(files("modaldummy")))
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *folder.rglob("*.py")]
    # As in "pip install modaldummy[demo]" or "pip install '.[demo,lightning]'".
    pattern = re.compile(r"(?:modaldummy|[ '`]\.)\[([a-z,]+)\]")
    found = {extras for path in texts for extras in pattern.findall(path.read_text())}
    named = {extra for extras in found for extra in extras.split(",")}
    assert {"demo", "testing", "transformers", "lightning"} <= named
    assert named <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_a_test_of_its_type(module: str) -> None:
    """`typing_tests` use it, beyond importing it."""
    used = "".join(path.read_text() for path in ROOT.glob("typing_tests/*.py"))
    names = importlib.import_module(module).__all__
    once = [name for name in names if len(re.findall(rf"\b{name}\b", used)) < 2]
    assert once == []
