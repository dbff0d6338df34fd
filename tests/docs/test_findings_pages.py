"""The pages about findings: every code has its section, its row and its leaf; tables are true."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

import modaldummy
from modaldummy._diagnose.evidence import Thresholds

ROOT = Path(__file__).parents[2]
DIAGNOSE = ROOT / "docs/reference/diagnose.md"
PREFLIGHT = ROOT / "docs/reference/preflight.md"
MONITOR = ROOT / "docs/how-to/monitor.md"
TROUBLESHOOT = ROOT / "docs/how-to/troubleshoot.md"
CHECKS = sorted(Path(modaldummy.__file__).parent.glob("_diagnose/check_*.py"))
SOURCE = "".join(path.read_text() for path in CHECKS)


def prose(page: Path) -> str:
    """A page without its code, in which a comment would look like a heading."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def anchor(heading: str) -> str:
    """As GitHub makes it: lower case, no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", prose(page), re.M)


def codes_of(page: Path) -> list[str]:
    return re.findall(r"^## (MD\d+): ", prose(page), re.M)


def test_anchors_are_those_of_github() -> None:
    assert anchor("MD105: ZeRO-2") == "md105-zero-2"
    assert anchor("What `total` does, and why") == "what-total-does-and-why"


def test_every_code_of_a_diagnosis_has_a_row_and_a_section() -> None:
    """With one title, and in the table the severities that the source has."""
    codes = sorted(set(re.findall(r'"(MD2\d\d)"', SOURCE)))
    assert len(codes) >= 15
    assert codes_of(DIAGNOSE) == codes
    rows = re.findall(r"^\| \[(MD\d+)\]\(#.+\) \| (\w+) \| (.+) \|$", prose(DIAGNOSE), re.M)
    sections = re.findall(r"^## (MD\d+): (.+)$", prose(DIAGNOSE), re.M)
    assert [(code, title) for code, _, title in rows] == sections
    severities = dict(re.findall(r'"(MD2\d\d)",\s+"(\w+)",', SOURCE))
    severities |= {"MD222": "warning", "MD223": "error"}  # written as a choice
    assert {code: severity for code, severity, _ in rows} == severities


def test_every_code_has_an_example_that_finds_it() -> None:
    """The snippets run elsewhere; here they must name the code and assert something."""
    for section in re.split(r"^## (?=MD2)", DIAGNOSE.read_text(), flags=re.M)[1:]:
        code = section.partition(":")[0]
        (snippet,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
        assert re.search(rf'^ *assert .*"{code}"', snippet, re.M), code
        assert "\nRemedy: " in section, code


def test_the_table_of_thresholds_is_that_of_the_code() -> None:
    table = prose(DIAGNOSE).partition("| name | default | meaning |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([\d.e-]+) \| .+ \|$", table, re.M)
    assert {name: float(default) for name, default in rows} == asdict(Thresholds())
    assert [name for name, _ in rows] == list(asdict(Thresholds()))


def test_every_code_is_at_a_leaf_of_the_tree() -> None:
    """In a list item, with a link to its section."""
    items = "\n".join(re.findall(r"^ *- .+(?:\n +(?!- ).+)*", prose(TROUBLESHOOT), re.M))
    for page in (PREFLIGHT, DIAGNOSE):
        found = set(re.findall(rf"\[(MD\d+)\]\(\.\./reference/{page.name}#", items))
        assert found == set(codes_of(page))


@pytest.mark.parametrize("page", [DIAGNOSE, PREFLIGHT, MONITOR, TROUBLESHOOT], ids=lambda p: p.name)
def test_anchors_lead_to_headings(page: Path) -> None:
    """A link that is called by a code leads to the section of that code."""
    links = re.findall(r"\[([^]]+)\]\((?!https?:)([^)#]*)#([^)]+)\)", prose(page))
    assert links
    for text, target, fragment in links:
        there = (page.parent / target).resolve() if target else page
        assert fragment in {anchor(heading) for heading in headings(there)}, (target, fragment)
        if re.fullmatch(r"MD\d+", text):
            assert fragment.startswith(f"{text.lower()}-"), (text, fragment)
