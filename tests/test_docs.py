"""The documentation: snippets run, and every finding has its section."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

import modaldummy

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TUTORIAL = ROOT / "docs/tutorial.md"


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each code block of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.M | re.S)


def has_snippets(page: Path) -> bool:
    return any(language == "python" for language, _ in blocks(page))


# Torch's own compiler makes an instance of the Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", [p for p in PAGES if has_snippets(p)], ids=lambda p: p.name)
def test_snippets_run(page: Path) -> None:
    """From top to bottom of a page, as a reader would type them; then the tests in them.

    The tutorial shows the output of each snippet in the block after it.
    """
    namespace: dict[str, Any] = {"__name__": "snippet"}
    following = [*blocks(page)[1:], ("", "")]
    for (language, code), (next_language, shown) in zip(blocks(page), following, strict=True):
        if language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, str(page), "exec"), namespace)
            if page == TUTORIAL and next_language == "text":
                assert_same_output(printed.getvalue(), shown)
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    assert bool(tests) == (page.name == "property-test-your-model.md")
    for test in tests:
        test()


def assert_same_output(printed: str, shown: str) -> None:
    """Word by word; numbers may differ by five percent, as rounding differs between machines."""
    words, expected = (re.split(r"([\s:,%()]+)", text.strip()) for text in (printed, shown))
    assert len(words) == len(expected), printed
    for word, other in zip(words, expected, strict=True):
        try:
            assert float(word) == pytest.approx(float(other), rel=0.05), printed
        except ValueError:
            assert word == other, printed


def test_the_pages_that_a_reader_starts_with_have_snippets() -> None:
    """Otherwise the test above would pass on pages without any."""
    for page in ("README.md", "docs/tutorial.md", "docs/how-to/your-own-loop.md"):
        assert has_snippets(ROOT / page), page


@pytest.mark.parametrize(("group", "name"), [("MD1", "preflight"), ("MD2", "diagnose")])
def test_every_code_has_its_section(group: str, name: str) -> None:
    """And no section is about a code that nothing finds."""
    sources = Path(modaldummy.__file__).parent.glob(f"_{name}/*.py")
    codes = {code for path in sources for code in re.findall(r'"(MD\d{3})"', path.read_text())}
    page = (ROOT / f"docs/reference/{name}.md").read_text()
    assert codes == set(re.findall(rf"^## ({group}\d\d): ", page, re.M))


def test_the_readme_shows_the_loop_as_python() -> None:
    """The diff of the training loop, applied, is a loop that compiles."""
    (diff,) = (text for language, text in blocks(ROOT / "README.md") if language == "diff")
    added = [line[1:] for line in diff.splitlines() if not line.startswith("-")]
    compile("\n".join(added), "README.md", "exec")
