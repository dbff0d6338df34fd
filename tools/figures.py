"""Counts what the project consists of, so that changes can be compared: `make figures`.

A code line is a line that is neither blank nor made of comments or docstrings alone.
"""

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

import modaldummy

ROOT = Path(__file__).parents[1]
SOURCE = Path(modaldummy.__file__).parent
_NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    tokenize.ENDMARKER,
}


def num_code_lines(path: Path) -> int:
    """Code lines of a Python file."""
    text = path.read_text()
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(lines)


def code_lines(folder: Path) -> Counter[str]:
    """Code lines by file or package directly below a folder, the largest first."""
    found: Counter[str] = Counter()
    for path in folder.rglob("*.py"):
        found[path.relative_to(folder).parts[0]] += num_code_lines(path)
    return Counter(dict(found.most_common()))


def num_doc_words() -> int:
    """Words of all pages of documentation, with their code."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return sum(len(page.read_text().split()) for page in pages)


def main() -> None:
    """Print the figures."""
    source, core = code_lines(SOURCE), code_lines(SOURCE / "_core")
    tests = code_lines(ROOT / "tests")
    print(f"{sum(source.values()):6} code lines in src/modaldummy, by package:")
    for name, number in source.items():
        print(f"{number:10}   {name}")
    print(f"{sum(core.values()):6} code lines in _core, by file:")
    for name, number in core.items():
        print(f"{number:10}   {name}")
    print(f"{sum(tests.values()):6} code lines in tests")
    print(f"{sum(tests.values()) / sum(source.values()):6.2f} test lines per source line")
    print(f"{num_doc_words():6} words in the pages of documentation")


if __name__ == "__main__":
    main()
