"""The site: no warning, no page or link is missing, and what is public is documented."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import pytest

import modaldummy

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(
    str(page.relative_to(DOCS).with_suffix(".html"))
    for ending in ("md", "page")
    for page in DOCS.glob(f"**/*.{ending}")
)
PUBLIC = runpy.run_path(str(DOCS / "_ext/public.py"))
SHELVES = runpy.run_path(str(DOCS / "_ext/shelves.py"))


def build(source: Path, target: Path, builder: str = "html") -> tuple[int, str]:
    """Exit code and output of the build that `make docs` runs."""
    options = ("--fail-on-warning", "--keep-going", "--nitpicky", "--quiet", "--builder", builder)
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(source), str(target)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("site")


@pytest.fixture(scope="module")
def built(site: Path) -> tuple[int, str]:
    return build(DOCS, site)


@dataclass
class Page(HTMLParser):
    """What a page of the site has in it."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    images: list[dict[str, str | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {found["id"] or ""} if "id" in found else set()
        if tag == "a" and "href" in found:
            self.links.append(found["href"] or "")
        self.loaded += [found.get("src") or "", (found.get("href") or "") if tag == "link" else ""]
        self.images += [found] if tag == "img" else []


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text())
    return page


@pytest.fixture(scope="module")
def pages(site: Path, built: tuple[int, str]) -> dict[str, Page]:
    return {str(path.relative_to(site)): read(path) for path in sorted(site.rglob("*.html"))}


def test_the_site_builds_without_a_warning(built: tuple[int, str]) -> None:
    assert built == (0, "")


def test_every_page_is_in_the_site(pages: dict[str, Page]) -> None:
    assert len(PAGES) > 40
    assert set(PAGES) <= pages.keys()


def test_links_lead_to_files_and_anchors(site: Path, pages: dict[str, Page]) -> None:
    """Of every page, also those that a builder adds."""
    wrong = []
    for name, page in pages.items():
        for link in page.links:
            if re.match(r"https?:", link):
                continue
            target, _, anchor = unquote(link).partition("#")
            there = ((site / name).parent / target).resolve() if target else site / name
            known = pages.get(str(there.relative_to(site)))
            if not there.is_file() or (known and anchor and anchor not in known.ids):
                wrong.append((name, link))
    assert wrong == []


def test_the_sidebar_leads_to_every_page(pages: dict[str, Page]) -> None:
    """Seen on the page of the search, which has no links besides."""
    assert set(PAGES) <= set(pages["search.html"].links)


def test_the_site_loads_nothing_from_elsewhere(pages: dict[str, Page]) -> None:
    """It can be read without a network, formulas included."""
    loaded = [source for page in pages.values() for source in page.loaded]
    assert any(source.endswith(".js") for source in loaded)
    assert not [source for source in loaded if re.match("(https?:)?//", source)]


def test_images_have_a_text(pages: dict[str, Page]) -> None:
    images = [image for name in PAGES for image in pages[name].images]
    assert len(images) >= 3
    assert all(image.get("alt") for image in images)


@pytest.mark.usefixtures("built")
def test_the_search_knows_pages_and_functions(site: Path) -> None:
    text = (site / "searchindex.js").read_text()
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    assert {f"{name}.html" for name in index["docnames"]} == set(PAGES)
    assert "hold_inactive" in {entry[-1] for entry in index["objects"]["modaldummy"]}


@pytest.mark.usefixtures("built")
def test_formulas_and_types_are_drawn(site: Path) -> None:
    """Formulas as MathML; aliases of types under their names, in place of what they stand for."""
    page = (site / "reference/api/wrap.html").read_text()
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in page
    assert r"\frac" not in page
    signature = page.partition('id="modaldummy.DummyLossWrapper"')[2].partition("</dt>")[0]
    assert 'href="#ModalityParamMap"' in signature
    assert "Iterable[ParamSpec]" not in re.sub("<[^>]+>", "", signature)


def test_an_undocumented_name_fails_the_build(tmp_path: Path) -> None:
    """The site without one line of the reference, as a name that was forgotten."""
    for name in ("_ext", "_static", "reference/api"):
        shutil.copytree(DOCS / name, tmp_path / "docs" / name)
    for name in ("conf.py", "reference/api.md"):
        shutil.copy(DOCS / name, tmp_path / "docs" / name)
    hold = tmp_path / "docs/reference/api/hold.md"
    line = ".. autofunction:: hold_inactive\n"
    assert line in hold.read_text()
    hold.write_text(hold.read_text().replace(line, ""))
    (tmp_path / "docs/index.md").write_text(
        "# Index\n\n## Reference\n\n- [API](reference/api.md)\n"
    )
    code, output = build(tmp_path / "docs", tmp_path / "site", "dummy")
    assert code == 1
    gaps = re.findall(r"`(\S+)` is public, and no page documents it", output)
    assert gaps == ["modaldummy.hold_inactive"]


class Documented:
    """A class with a docstring."""

    field: int
    _private: int

    def __init__(self, told: int) -> None:
        self.told, self.set_here, self._hidden = told, 1, 2

    def method(self) -> None:
        """Do nothing."""

    def bare(self) -> None: ...

    @property
    def value(self) -> int:
        return 1

    def _own(self) -> None: ...


class Bare(Documented): ...


def gaps(documented: Iterable[str]) -> list[str]:
    module: Any = ModuleType("m")
    module.Documented, module.Bare, module.__all__ = Documented, Bare, ["Documented", "Bare"]
    return list(PUBLIC["gaps"](module, set(documented)))


def test_gaps_are_names_and_members_without_a_docstring_or_a_page() -> None:
    assert gaps([]) == [
        "`m.Documented` is public, and no page documents it",
        "`m.Documented.method` is public, and no page documents it",
        "`m.Documented.bare` has no docstring",
        "`m.Documented.value` has no docstring",
        "`m.Documented.field` is public, and no page documents it",
        "`m.Documented.set_here` is public, and no page documents it",
        "`m.Bare` is public, and no page documents it",
        "`m.Bare` has no docstring",
    ]
    members = [f"m.Documented.{name}" for name in ("method", "field", "set_here")]
    assert gaps(["m.Documented", "m.Bare", *members]) == [
        "`m.Documented.bare` has no docstring",
        "`m.Documented.value` has no docstring",
        "`m.Bare` has no docstring",
    ]


def test_every_public_module_is_looked_at() -> None:
    """Those with an `__all__` and no underscore on the way."""
    root = Path(modaldummy.__file__).parent
    files = [path for path in root.rglob("*.py") if "\n__all__" in path.read_text()]
    parts = [path.relative_to(root.parent).with_suffix("").parts for path in files]
    names = {".".join(part).removesuffix(".__init__") for part in parts}
    assert {name for name in names if "._" not in name} == set(PUBLIC["MODULES"])


def test_links_out_of_the_docs_lead_on_in_the_site(tmp_path: Path) -> None:
    """To a page, a download, a picture; of a folder the words stay, and so does code."""
    docs = tmp_path / "docs"
    for name in ("docs/how-to", "examples"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("CHANGELOG.md", "examples/ddp.py", "examples/plot.png", "docs/how-to/hold.md"):
        (tmp_path / name).write_text("[hold](docs/how-to/hold.md#ranks)")
    (docs / "changelog.page").write_text("../CHANGELOG.md\n")
    page = docs / "how-to/page.md"
    expected = {
        "[a](../../CHANGELOG.md)": "[a](../changelog.page)",
        "[b](../../examples/ddp.py)": "[b](path:../../examples/ddp.py)",
        "[c](../../examples)": "c",
        "![d](../../examples/plot.png)": "![d](../../examples/plot.png)",
        "[e](hold.md)": "[e](hold.md)",
        "[f](https://example.org)": "[f](https://example.org)",
        '`model["T1"](data)`': '`model["T1"](data)`',
    }
    page.write_text("\n".join(expected))
    assert SHELVES["relinked"](docs, page).splitlines() == list(expected.values())
    assert SHELVES["relinked"](docs, docs / "changelog.page") == "[hold](how-to/hold.md#ranks)"


INDEX = """
# Index

## One

[a](x/a.md), [b](x/a/b.md)

```text
[no](no.md)
```

## Two

- [See](c.page#there)
"""


def test_lists_of_links_become_the_sidebar(tmp_path: Path) -> None:
    """Code is not looked at, an item says what its page is called, and folders are their page's."""

    def trees(text: str, name: str) -> list[list[str]]:
        made = SHELVES["toctrees"](text, tmp_path / name, name == "index.md")
        return [tree.split() for tree in re.findall(r"```{toctree}\n(.*?)```", made, re.S)]

    assert trees(INDEX, "index.md") == [
        [":hidden:", ":caption:", "One", "x/a"],
        [":hidden:", ":caption:", "Two", "See", "<c>"],
    ]
    assert trees("[b](a/b.md) [c](c.md)", "a.md") == [[":hidden:", "a/b"]]
    assert trees("[c](c.md)", "a.md") == []
