"""The structure of the package is what its picture shows, and arrows point one way."""

from pathlib import Path

from tests.architecture import (
    AROUND,
    ARROWS,
    BOXES,
    CORE,
    PICTURE,
    ROOT,
    SOURCE,
    WORDS,
    draw,
    imports,
    num_code_lines,
)

PAGE = (ROOT / "docs/explanation/design.md").read_text()


def test_the_arrows_are_the_imports() -> None:
    assert imports() == ARROWS.keys()


def test_the_picture_is_up_to_date() -> None:
    """Otherwise run `python -m tests.architecture`."""
    assert PICTURE.read_text() == draw()
    assert PICTURE.name in PAGE


def test_every_file_has_its_place() -> None:
    files = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    placed = [file for box in BOXES.values() for file in box.files]
    assert sorted([*placed, *WORDS, "__init__"]) == sorted(files - {"__pycache__"})


def test_arrows_point_down() -> None:
    """So that no two parts need each other."""
    for one, other in ARROWS:
        assert other == "core" or BOXES[one].y < BOXES[other].y or one == "arguments"
    assert not {one for one, other in ARROWS if one in CORE and other in (*AROUND, "core")}


def test_the_page_has_a_word_on_every_file() -> None:
    for path in (*SOURCE.glob("_[!_]*.py"), *SOURCE.glob("_*/[!_]*.py")):
        assert f"`{path.stem}`" in PAGE, path.stem


def test_files_are_short_and_the_core_is_small() -> None:
    """300 lines a file; 1,800 lines of code in all that runs in a loss."""
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path.name
    core = [path for path in SOURCE.glob("*.py") if path.stem != "__main__"]
    assert 1_000 < sum(map(num_code_lines, core)) < 1_800


def test_lines_of_code_are_counted_as_said(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    code = 'x = """a\n\nb"""\n\n\ndef f():\n    "f"\n    return (1,\n\n            2)\n'
    path.write_text(f'"""Text.\n\nMore.\n"""\n\n# why\n{code}')
    assert num_code_lines(path) == 3 + 1 + 2
