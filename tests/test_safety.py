"""The library makes no code of what it reads, and writes only files that it is told to.

`banned-api` in `pyproject.toml` forbids the modules that load code, start processes or go online.
These tests check what ruff cannot forbid by name.
"""

import ast
import re
from pathlib import Path

import pytest

import modaldummy

PACKAGE = Path(modaldummy.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
WRITING = re.compile(
    r"\.(write_text|write_bytes|mkdir|touch|unlink|rename|symlink_to|savefig|tofile|to_csv)\("
    r"|\bopen\((?:[^()]*,)?\s*(?:mode=)?['\"][rbt]*[wax+]"
    r"|\bos\.(open|makedirs|mkdir|remove|rename|replace|unlink|rmdir|link|symlink|truncate)\("
)
WRITERS = {
    "__main__.py": "the null device, where nobody reads its output any more",
    "_diagnose/picture.py": "the picture that `--plot` names",
    "demo/command.py": "the folder that `--out` names, or `demo-output` below the current one",
}


def test_nothing_evaluates_text() -> None:
    nodes = [node for path in FILES for node in ast.walk(ast.parse(path.read_text()))]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    assert "len" in names
    assert names & {"eval", "exec", "compile", "__import__"} == set()


def test_few_files_write() -> None:
    """Where they are told to, and nowhere else."""
    writers = {path for path in FILES if WRITING.search(path.read_text())}
    assert {path.relative_to(PACKAGE).as_posix() for path in writers} == WRITERS.keys()


@pytest.mark.parametrize(
    "source",
    ["open(path, 'w')", 'open(path, mode="ab")', "path.open('r+')", "os.remove(path)", "p.touch()"],
)
def test_a_write_is_seen(source: str) -> None:
    assert WRITING.search(source)


@pytest.mark.parametrize("source", ["open(path)", "open(path, 'rb')", "path.open()", "reopen('w')"])
def test_a_read_is_not_taken_for_a_write(source: str) -> None:
    assert not WRITING.search(source)
