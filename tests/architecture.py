"""Which part of the package imports which, and the picture of it in `docs/explanation/design.md`.

`python -m tests.architecture` writes the picture. Boxes are placed by hand; what stands in them and
which arrows there are is read from the sources.
"""

import ast
import io
import tokenize
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

import modaldummy

ROOT = Path(__file__).parent.parent
SOURCE = Path(modaldummy.__file__).parent
PICTURE = ROOT / "docs/images/design.svg"
# Every part may import these, so that arrows to them would say nothing.
WORDS = ("_errors", "_finding")


class Box(NamedTuple):
    """A part of the package: what it does, its files from top to bottom, and where it is drawn."""

    says: str
    files: tuple[str, ...]
    x: int
    y: int
    width: int


# A package is one file here. Files of a box import downward.
CORE = {
    "wrapper": Box("adds the dummy to a loss", ("_wrapper",), 440, 400, 190),
    "arguments": Box("checks of arguments", ("_arguments",), 690, 400, 150),
    "batch": Box("what a batch holds", ("_call", "_batch", "_values"), 165, 500, 130),
    "map": Box("who owns what", ("_modalities", "_kinds", "_paths"), 305, 500, 120),
    "term": Box("value and gradient", ("_term", "_reduce", "_triton"), 435, 500, 130),
    "loss": Box("the loss in a result", ("_loss", "_containers"), 575, 500, 130),
    "report": Box("what a step did", ("_report",), 715, 500, 110),
    "engine": Box("DDP; graphs", ("_ddp", "_graph"), 835, 500, 90),
}
AROUND = {
    "__main__": Box("the command", ("__main__",), 20, 20, 220),
    "integrations": Box("Trainer, Lightning", ("integrations",), 270, 20, 520),
    "testing": Box("for users' CI", ("testing",), 815, 20, 110),
    "demo": Box("real scans", ("demo",), 70, 140, 115),
    "monitor": Box("gradients of a step", ("_monitor",), 270, 140, 130),
    "preflight": Box("before training", ("_preflight",), 420, 140, 130),
    "hold": Box("the optimizer", ("_hold",), 630, 140, 130),
    "diagnose": Box("logs of a run", ("_diagnose",), 20, 260, 110),
    "ranks": Box("many processes", ("_ranks",), 480, 260, 220),
}
BOXES = AROUND | CORE
# Where each arrow leaves its box and where it arrives; "core" is the frame around CORE.
ARROWS = {
    ("__main__", "diagnose"): (45, 45),
    ("__main__", "demo"): (110, 110),
    ("__main__", "core"): (215, 215),
    ("demo", "diagnose"): (100, 100),
    ("demo", "core"): (165, 165),
    ("integrations", "monitor"): (335, 335),
    ("integrations", "preflight"): (485, 485),
    ("integrations", "ranks"): (590, 590),
    ("integrations", "hold"): (680, 680),
    ("integrations", "core"): (775, 775),
    ("testing", "core"): (870, 870),
    ("monitor", "core"): (335, 335),
    ("preflight", "core"): (445, 445),
    ("preflight", "ranks"): (515, 515),
    ("hold", "ranks"): (660, 660),
    ("hold", "core"): (730, 730),
    ("ranks", "core"): (590, 590),
    ("arguments", "wrapper"): (690, 630),
    ("wrapper", "batch"): (455, 230),
    ("wrapper", "map"): (485, 365),
    ("wrapper", "term"): (515, 500),
    ("wrapper", "loss"): (555, 640),
    ("wrapper", "report"): (585, 770),
    ("wrapper", "engine"): (615, 880),
}
_LINE = 17  # height of a line of text
_FRAME = (150, 370, 785, 230)  # x, y, width, height


def imports() -> set[tuple[str, str]]:
    """Pairs of boxes of which the first imports the second; the core as a whole from outside."""
    box_of = {file: name for name, box in BOXES.items() for file in box.files}
    found = set()
    for path in sorted(SOURCE.rglob("*.py")):
        file = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if file == "__init__" or file in WORDS:
            continue
        for other in _imported(path):
            if other not in (file, *WORDS):
                found.add(_arrow(box_of[file], box_of[other]))
    return {(one, other) for one, other in found if one != other}


def _arrow(one: str, other: str) -> tuple[str, str]:
    return (one, "core") if one in AROUND and other in CORE else (one, other)


def _imported(path: Path) -> Iterator[str]:
    """First segments, below the package, of what a file imports from the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        package, *rest = node.module.split(".")
        if package == "modaldummy":
            for name in rest[:1] or [alias.name for alias in node.names]:
                # A public name, of which the picture says that it is of the core.
                is_module = (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").is_file()
                yield name if is_module else "_wrapper"


def num_code_lines(path: Path) -> int:
    """Lines of a file that hold code: neither blank, nor comments, nor docstrings alone."""
    text = path.read_text()
    no_code = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*no_code, tokenize.ENDMARKER):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(lines)


def draw() -> str:
    """The picture, as SVG."""
    x, y, width, height = _FRAME
    parts = [
        f'<rect class="core" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>',
        f'<text class="says" x="{x + 12}" y="{y + 18}">the core: what runs in a loss</text>',
        *(_drawn_arrow(*pair, *ends) for pair, ends in ARROWS.items()),
        *(_drawn_box(box) for box in BOXES.values()),
        f'<rect class="box" x="20" y="620" width="915" height="{_LINE + 12}" rx="5"/>',
        f'<text x="478" y="639">{", ".join(WORDS)}<tspan class="says"> words that all of them use'
        "</tspan></text>",
    ]
    return "\n".join([_HEAD, *parts, "</svg>\n"])


def _height(box: Box) -> int:
    return _LINE * (len(box.files) + 1) + 10


def _drawn_box(box: Box) -> str:
    middle = box.x + box.width // 2
    lines = [
        f'<rect class="box" x="{box.x}" y="{box.y}" width="{box.width}" height="{_height(box)}" '
        'rx="5"/>'
    ]
    for number, file in enumerate(box.files, start=1):
        lines.append(f'<text x="{middle}" y="{box.y + _LINE * number}">{file}</text>')
    bottom = box.y + _LINE * (len(box.files) + 1)
    lines.append(f'<text class="says" x="{middle}" y="{bottom}">{escape(box.says)}</text>')
    return "\n".join(lines)


def _drawn_arrow(one: str, other: str, start: int, end: int) -> str:
    box = BOXES[one]
    top, bottom = box.y + _height(box), _FRAME[1] if other == "core" else BOXES[other].y
    if other != "core" and BOXES[other].y == box.y:  # side by side
        top = bottom = box.y + _height(box) // 2
    return f'<path class="arrow" id="{one}-{other}" d="M{start} {top} L{end} {bottom}"/>'


_HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 955 665" font-family="sans-serif">
<style>
  text { font-size: 13px; text-anchor: middle; fill: #1b1b1b }
  .says { font-size: 11.5px; fill: #5a5a5a }
  text.says:first-of-type { text-anchor: start }
  .box { fill: #ffffff; stroke: #7a8793 }
  .core { fill: #eaf2f9; stroke: #1c6dab }
  .arrow { stroke: #55606a; fill: none; marker-end: url(#head) }
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="8" markerHeight="8"
  orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#55606a"/></marker></defs>
<rect width="955" height="665" fill="#fbfbfb"/>"""


if __name__ == "__main__":
    PICTURE.write_text(draw())
