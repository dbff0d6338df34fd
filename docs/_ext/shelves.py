"""Pages are plain Markdown that links as it lies in the repository; this makes a site of it.

- The lists of links under the headings of `index.md` become the parts of the sidebar, so that the
  order of pages is written once. A page that an item begins with is called there as in the item.
  A page beside a folder of its name leads to the pages in it.
- `changelog.page` and the like hold the path of a file outside of `docs`, which is the page. Links
  to such a file lead there; links to other files outside become downloads; of links to folders the
  text stays.
"""

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

FENCE = re.compile(r"^( *)```.*?^\1```$", re.M | re.S)
ITEM = re.compile(r"^- \[([^]]+)\]\(([^)#\s]+)", re.M)
LINK = re.compile(r"\[([^]]+)\]\((?!https?:)([^)#\s]+)(#[^)\s]*)?\)")


def shown_file(page: Path) -> Path:
    """What a page shows: itself, or a file from outside."""
    return page if page.suffix == ".md" else (page.parent / page.read_text().strip()).resolve()


def relinked(folder: Path, page: Path) -> str:
    """The Markdown text of a page of the site in `folder`, with links as they lead on there."""
    source = shown_file(page)
    pages = {shown_file(path): path for path in folder.glob("*.page")}

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match.groups(default="")
        file = (source.parent / target).resolve()
        inside = file.is_relative_to(folder)
        # Code may look like a link.
        if not file.exists() or (inside and source == page):
            return match[0]
        if file.is_dir():
            return words
        there = os.path.relpath(pages.get(file, file), page.parent)
        is_kept = inside or file in pages or file.suffix in (".png", ".svg")
        return f"[{words}]({'' if is_kept else 'path:'}{there}{anchor})"

    return LINK.sub(link, source.read_text())


def pages_in(text: str) -> list[str]:
    """The pages that a text links to, without the endings of their names."""
    targets = [target for _, target, _ in LINK.findall(FENCE.sub("", text))]
    found = [Path(target) for target in targets if Path(target).suffix in (".md", ".page")]
    return [str(path.with_suffix("")) for path in dict.fromkeys(found)]


def toctree(pages: list[str], caption: str = "") -> str:
    """A toctree that only the sidebar shows, or nothing."""
    options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["\n\n```{toctree}", *options, "", *pages, "```\n"]) if pages else ""


def toctrees(text: str, page: Path, is_first: bool) -> str:
    """What a page leads to."""
    if not is_first:
        return toctree([name for name in pages_in(text) if name.startswith(f"{page.stem}/")])
    trees = []
    called = {str(Path(target).with_suffix("")): words for words, target in ITEM.findall(text)}
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        pages = pages_in(section)
        # The folder of a page is that page's own.
        top = [p for p in pages if not any(p.startswith(f"{other}/") for other in pages)]
        entries = [f"{called[p]} <{p}>" if p in called else p for p in top]
        trees.append(toctree(entries, section.partition("\n")[0]))
    return "".join(trees)


def read_page(app: Sphinx, docname: str, content: list[str]) -> None:
    """Prepare a page before it is parsed."""
    page = Path(app.env.doc2path(docname))
    app.env.note_dependency(shown_file(page))
    text = relinked(Path(app.srcdir), page)
    content[0] = text + toctrees(text, page, docname == app.config.root_doc)


def setup(app: Sphinx) -> dict[str, bool]:
    """Listen to what is read."""
    app.connect("source-read", read_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
