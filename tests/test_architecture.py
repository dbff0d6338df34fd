"""Imports inside the package go one way, and no file reads what is private to another object."""

from pathlib import Path

import pytest
from tools import figures
from tools.architecture import ALLOWED, CORE, PICTURE, ROOT, SAYS, SOURCE, draw, imports, part_of

PAGE = (ROOT / "docs/explanation/design.md").read_text()


def test_parts_import_only_what_they_may() -> None:
    """The core knows no add-on, and `__init__` alone knows everything."""
    wrong = {
        (path.relative_to(SOURCE).as_posix(), module)
        for path, module in imports()
        if (part := part_of(path)) != "__init__"
        and module.partition(".")[0] not in {part, *ALLOWED[part]}
    }
    assert wrong == set()


def test_no_two_parts_need_each_other() -> None:
    """Each part is declared after all that it may import."""
    order = [*ALLOWED]
    for part, allowed in ALLOWED.items():
        below = allowed - {"__init__"}  # public names, for those that users start
        assert all(order.index(name) < order.index(part) for name in below), part


def test_files_of_the_core_import_downward() -> None:
    order = [*CORE]
    core = [(path.stem, module) for path, module in imports() if part_of(path) == "_core"]
    inside = [(file, module.removeprefix("_core.")) for file, module in core if "_core" in module]
    for file, imported in inside:
        if file != "__init__" and imported != "_core":
            assert order.index(file) < order.index(imported), (file, imported)


def test_every_part_is_declared() -> None:
    parts = {part_of(path) for path in SOURCE.rglob("*.py")} - {"__init__"}
    assert parts == ALLOWED.keys()
    assert parts == {*SAYS, "_core"}
    files = {path.stem for path in (SOURCE / "_core").glob("*.py")} - {"__init__"}
    assert files == CORE.keys()


def test_the_picture_is_up_to_date() -> None:
    """Otherwise run `python -m tools.architecture`."""
    assert PICTURE.read_text() == draw()
    assert PICTURE.name in PAGE


def test_the_page_explains_every_file() -> None:
    for path in (*SOURCE.glob("_[!_]*.py"), *SOURCE.glob("_*/[!_]*.py")):
        assert f"`{path.stem}`" in PAGE, path.stem


def test_files_inside_a_package_carry_no_underscore() -> None:
    assert [path.name for path in SOURCE.glob("*/_[!_]*.py")] == []


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.stem)
def test_private_attributes_are_left_to_their_owners(path: Path) -> None:
    """`_engines.py` alone reads those of other libraries."""
    reads = list(figures.private_reads(path))
    assert bool(reads) == (path == figures.ENGINES), reads


def test_private_reads_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "SOURCE", tmp_path)
    path = tmp_path / "some.py"
    path.write_text('self._a, x._b, x.y._c(), getattr(x, "_d", 1), hasattr(x, "e"), x.__len__')
    assert [read.split()[1] for read in figures.private_reads(path)] == ["_b", "_d", "_c"]


def test_the_core_stays_small() -> None:
    """At most 1,300 code lines in what runs in a loss."""
    assert sum(figures.code_lines(SOURCE / "_core").values()) <= 1300


def test_code_lines_are_counted_as_said(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    code = 'x = """a\n\nb"""\n\n\ndef f():\n    "f"\n    return (1,\n\n            2)\n'
    path.write_text(f'"""Text.\n\nMore.\n"""\n\n# why\n{code}')
    assert figures.num_code_lines(path) == 3 + 1 + 2
