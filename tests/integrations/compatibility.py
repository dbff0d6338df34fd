"""The libraries that the tests use for real, as a page of the reference.

`python -m tests.integrations.compatibility` reads the source of the tests, runs none of them, and
writes docs/reference/compatibility.md.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from itertools import starmap
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/reference/compatibility.md"
PINS = ROOT / "requirements/constraints.txt"

# The libraries that a whole file is about. A module constant `LIBRARIES` says the same, and counts
# first; where it is empty, each test is about what it imports.
FILES: dict[str, tuple[str, ...]] = {
    "tests/integrations/test_accelerate*.py": ("accelerate",),
    "tests/integrations/test_fabric*.py": ("lightning",),
    "tests/integrations/test_lightning*.py": ("lightning",),
    "tests/integrations/test_plain_examples*.py": ("torch", "lightning", "accelerate"),
    "tests/integrations/test_trainer*.py": ("transformers",),
    "tests/integrations/test_umbrella*.py": ("transformers",),
    "tests/distributed/test_ddp.py": ("torch",),
    "tests/distributed/test_deepspeed.py": ("deepspeed",),
    "tests/distributed/test_fsdp.py": ("torch",),
    "tests/core/test_compile.py": ("torch",),
    "tests/core/test_peft.py": ("peft",),
}
# By what is imported; the first that fits. All tests import torch.
PACKAGES = {
    "torch.utils.tensorboard": "tensorboard",
    "torch_geometric": "torch-geometric",
    **{
        name: name
        for name in (
            *("accelerate", "datasets", "deepspeed", "lightning", "monai", "peft", "tensorboard"),
            *("tensordict", "torchio", "transformers", "wandb", "webdataset"),
        )
    },
}
_HEAD = """\
# Which libraries it is tested with

What the tests use for real, in the versions that `requirements/constraints.txt` pins. Numbers are
those of test functions: of those that `make test` runs, and of those that take longer or need more.
`python -m tests.integrations.compatibility` makes this page from the tests.

| library and what is tested | version | `make test` | more |
|---|---|---|---|
"""
_SECOND = """
## What is tested

In the words of the tests.
"""
_MORE = {"deepspeed": "`make test-deepspeed`"}  # all of its tests


class Tested(NamedTuple):
    """A test function.

    Attributes:
        library: What it uses.
        topic: What it is about, in a sentence.
        whole: Whether that is said by its file, which is about this library alone.
        everyday: Whether `make test` runs it, or some of its cases.
        long: Whether it, or some of its cases, are marked `long`.
    """

    library: str
    topic: str
    whole: bool
    everyday: bool
    long: bool


def read_sources() -> dict[str, str]:
    """The source of each file of tests that is about libraries, and of what stands beside them."""
    beside = set(ROOT.glob("tests/integrations/*.py"))
    others = {path for pattern in FILES for path in ROOT.glob(pattern)}
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(beside | others)}


def page(sources: Mapping[str, str], pins: str) -> str:
    """The page for these files, by path, and the text of the constraints.

    Raises:
        LookupError: A file of tests says nowhere which libraries it is about, or a library is not
            among the constraints.
    """
    versions = dict(re.findall(r"^([\w.-]+)==(\S+)$", pins, re.M))
    tests = [test for path in sources for test in tests_of(path, sources)]
    by_library = {
        library: [test for test in tests if test.library == library]
        for library in sorted({test.library for test in tests})
    }
    rows = [_row(library, versions[library], own) for library, own in by_library.items()]
    return "".join([_HEAD, *rows, _SECOND, *starmap(_topics, by_library.items())])


def _topics(library: str, tests: list[Tested]) -> str:
    topics = [test.topic for test in tests if test.whole] or [test.topic for test in tests]
    return f"\n### {library}\n\n" + "".join(f"- {topic}\n" for topic in dict.fromkeys(topics))


def _row(library: str, version: str, tests: list[Tested]) -> str:
    everyday, long = sum(test.everyday for test in tests), sum(test.long for test in tests)
    more = f"`make test-integrations`: {long}" if long else ""
    if library in _MORE:
        everyday, more = 0, f"{_MORE[library]}: {len(tests)}"
    return f"| [{library}](#{library}) | {version} | {everyday or ''} | {more} |\n"


def tests_of(path: str, sources: Mapping[str, str]) -> Iterator[Tested]:
    """The tests of a file, once for each library that they use; none if it is no file of tests."""
    if not PurePosixPath(path).name.startswith("test_"):
        return
    tree = ast.parse(sources[path])
    own = _libraries(path, tree)
    values, functions = _values(tree), _functions(path, sources)
    about = _sentence(ast.get_docstring(tree) or path)
    all_long = "long" in _marks([ast.Name("pytestmark")], values)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
            continue
        marks = _marks(node.decorator_list, values)
        whole = _marks([n for n in node.decorator_list if not isinstance(n, ast.Call)], values)
        everyday = not all_long and "long" not in whole
        long = all_long or "long" in marks
        for library in own:
            yield Tested(library, about, True, everyday, long)
        for library in sorted(_imported(node, functions) - set(own)):
            yield Tested(library, _topic(node), False, everyday, long)


def _libraries(path: str, tree: ast.Module) -> tuple[str, ...]:
    declared = _values(tree).get("LIBRARIES")
    if declared is not None:
        return tuple(ast.literal_eval(declared))
    for pattern, libraries in FILES.items():
        if fnmatch(path, pattern):
            return libraries
    raise LookupError(
        f"{path} does not say which libraries it is about; add it to `FILES` of "
        "tests/integrations/compatibility.py, or a constant `LIBRARIES` to it."
    )


def _values(tree: ast.Module) -> dict[str, ast.expr]:
    """What is assigned to names of the module."""
    found: dict[str, ast.expr] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and value is not None:
                found[target.id] = value
    return found


def _functions(path: str, sources: Mapping[str, str]) -> dict[str, ast.FunctionDef]:
    """Functions of a file, and of those in `sources` that it imports."""
    tree = ast.parse(sources[path])
    found: dict[str, ast.FunctionDef] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            beside = node.module.replace(".", "/") + ".py"
            if beside in sources and beside != path:
                found |= _functions(beside, sources)
    return found | {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def _marks(nodes: Iterable[ast.expr], values: Mapping[str, ast.expr]) -> set[str]:
    """Names of `pytest.mark`s in these expressions, and in what their names stand for."""
    found = set()
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and node.id in values:
            rest = {name: value for name, value in values.items() if name != node.id}
            found |= _marks([values[node.id]], rest)
    return found


def _imported(node: ast.FunctionDef, functions: Mapping[str, ast.FunctionDef]) -> set[str]:
    """Libraries that a function imports, or a function or fixture that it names."""
    found = set()
    rest = {name: function for name, function in functions.items() if function is not node}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            found |= {_library(alias.name) for alias in inner.names}
        elif isinstance(inner, ast.ImportFrom):
            found.add(_library(inner.module or ""))
        elif isinstance(inner, ast.Call) and ast.unparse(inner.func) == "import_module":
            found.add(_library(ast.literal_eval(inner.args[0])))
        name = getattr(inner, "id", None) or getattr(inner, "arg", None)
        if name in rest:
            found |= _imported(rest[name], rest)
    return found - {""}


def _library(module: str) -> str:
    fits = (name for name in PACKAGES if module == name or module.startswith(f"{name}."))
    return PACKAGES.get(next(fits, ""), "")


def _topic(node: ast.FunctionDef) -> str:
    words = node.name.removeprefix("test_").replace("_", " ").capitalize()
    text = ast.get_docstring(node)
    if text is None:
        return f"{words}."
    return f"{words}: {text[0].lower() if text[1:2].islower() else text[0]}{_sentence(text)[1:]}"


def _sentence(text: str) -> str:
    """The first sentence of a docstring, on one line, as a cell of a table can hold it."""
    first = re.split(r"(?<=\.)\s+(?=[A-Z])|\n\n", text.strip())[0]
    return " ".join(first.split()).rstrip(".").replace("|", "\\|") + "."


if __name__ == "__main__":
    PAGE.write_text(page(read_sources(), PINS.read_text()))
