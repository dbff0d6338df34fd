"""The table of libraries is made from the tests, and changes with them."""

import pytest

from tests.integrations.compatibility import PAGE, PINS, page, read_sources

LIBRARIES: tuple[str, ...] = ()

PATH = "tests/integrations/test_mail.py"
SOURCE = '''"""How letters are sorted. By hand."""

import pytest

LIBRARIES = ("torch",)
CASES = [1, pytest.param(2, marks=pytest.mark.long)]

def helper():
    from torch_geometric.data import Data

def test_sorting():
    """It is quick."""

@pytest.mark.long
def test_stamps_and_seals():
    """They stick: all of them. Not
    for long."""
    import monai.data

@pytest.mark.parametrize("case", CASES)
def test_graphs(case):
    helper()
'''
PINNED = "monai==1\ntorch==2.0+cpu\ntorch-geometric==3\nwandb==4\n"


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ")][1:]


def test_the_page_is_that_of_the_tests() -> None:
    """If not, run `python -m tests.integrations.compatibility`."""
    assert PAGE.read_text() == page(read_sources(), PINS.read_text())


def test_rows_come_from_docstrings_names_and_marks() -> None:
    """A file is about its own libraries, a test also about what it imports through helpers."""
    text = page({PATH: SOURCE}, PINNED)
    assert rows(text) == [
        "| [monai](#monai) | 1 |  | `make test-integrations`: 1 |",
        "| [torch](#torch) | 2.0+cpu | 2 | `make test-integrations`: 2 |",
        "| [torch-geometric](#torch-geometric) | 3 | 1 | `make test-integrations`: 1 |",
    ]
    topics = text.partition("### ")[2].split("\n\n")
    assert topics == [
        "monai",
        "- Stamps and seals: they stick: all of them.",
        "### torch",
        "- How letters are sorted.",
        "### torch-geometric",
        "- Graphs.\n",
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("How letters are sorted", "How parcels are sorted"),
        ("They stick", "They fall off"),
        ("test_graphs", "test_trees"),
        ("@pytest.mark.long\n", ""),
        ("marks=pytest.mark.long", "id='two'"),
        ("import monai.data", "import wandb"),
    ],
)
def test_a_changed_test_changes_the_page(old: str, new: str) -> None:
    assert SOURCE.count(old) == 1
    assert page({PATH: SOURCE.replace(old, new)}, PINNED) != page({PATH: SOURCE}, PINNED)


def test_a_helper_of_another_file_counts() -> None:
    beside = "tests/integrations/mail.py"
    source = '"""It is so."""\nfrom tests.integrations.mail import seal\nLIBRARIES = ()\n'
    source += "def test_it():\n    seal()\n"
    sources = {PATH: source, beside: "def seal():\n    import wandb\n"}
    assert rows(page(sources, PINNED)) == ["| [wandb](#wandb) | 4 | 1 |  |"]


def test_a_file_that_says_nothing_is_refused() -> None:
    source = SOURCE.replace('LIBRARIES = ("torch",)', "")
    with pytest.raises(LookupError, match="add it to `FILES`"):
        page({PATH: source}, PINNED)


def test_a_library_without_a_version_is_refused() -> None:
    with pytest.raises(KeyError, match="monai"):
        page({PATH: SOURCE}, PINNED.replace("monai", "money"))
