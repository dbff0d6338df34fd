"""What may import what inside the package, and the picture of it in `docs/explanation/design.md`.

`python -m tools.architecture` writes the picture. `tests/test_architecture.py` compares the imports
with `ALLOWED` and `CORE`, and the picture with the files.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import modaldummy

ROOT = Path(__file__).parents[1]
SOURCE = Path(modaldummy.__file__).parent
PICTURE = ROOT / "docs/images/design.svg"

# Parts of the package to what they may import, from the bottom to the top.
_BASE = {"_errors", "_numbers", "_engines", "_core"}
_SHARED = ("_arguments", "_findings", "_group", "_handles", "_optimizers", "_ownership")
_ADD_ON = {*_BASE, *_SHARED}
ADD_ONS = {
    "_diagnose": {"_errors", "_numbers", "_findings", "_core"},
    "_monitor": _ADD_ON,
    "_sampler": _ADD_ON,
    "_ranks": _ADD_ON,
    "_hold": {*_ADD_ON, "_ranks"},
    "_preflight": {*_ADD_ON, "_ranks", "_hold"},
}
ENTRY_POINTS = {
    "testing": {*_ADD_ON, "__init__"},
    "demo": {*_ADD_ON, *ADD_ONS, "__init__"},
    "integrations": {*_ADD_ON, *ADD_ONS},
    "__main__": {*_ADD_ON, *ADD_ONS, "demo"},
}
ALLOWED: dict[str, set[str]] = {
    "_errors": set(),
    "_engines": {"_errors"},
    "_core": {"_errors", "_numbers", "_engines"},
    "_numbers": {"_errors"},
    "_group": {"_errors"},
    "_optimizers": set(),
    "_findings": {"_errors"},
    "_handles": {"_errors"},
    "_arguments": _BASE,
    "_ownership": {"_core"},
    **ADD_ONS,
    **ENTRY_POINTS,
}
# Files of the core; each imports only files that come after it.
CORE = {
    "wrapper": "one step as a short story",
    "loss_function": "wraps a loss function",
    "batch": "which modalities a batch contains",
    "batch_values": "looks into one value of a batch",
    "report": "what a step did",
    "term": "value, cap and gradient",
    "reduce": "sums and fills of many tensors",
    "triton_kernels": "the sum in fused kernels",
    "parameter_map": "which parameters are inactive",
    "paths": "finds parameters by path",
    "parameter": "one parameter of a modality",
    "graph": "walks an autograd graph",
}
SAYS = {
    "__main__": "the command line",
    "integrations": "Trainer, Lightning",
    "demo": "real scans",
    "testing": "for your own CI",
    "_preflight": "before training",
    "_hold": "the optimizer",
    "_ranks": "several processes",
    "_monitor": "gradients of a step",
    "_sampler": "batches of ranks",
    "_diagnose": "logs of a run",
    "_arguments": "checks of arguments",
    "_findings": "what checks report",
    "_handles": "undo an effect",
    "_ownership": "who owns a parameter",
    "_group": "ranks of a group",
    "_numbers": "checks of numbers",
    "_optimizers": "what optimizers contain",
    "_engines": "facts about other libraries",
    "_errors": "exceptions, messages",
}


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports() -> Iterator[tuple[Path, str]]:
    """Each file of the package, and what it imports of the package: `_core.term`, `__init__`."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                package, _, module = node.module.partition(".")
                if package == "modaldummy":
                    for name in [module] if module else _modules(node):
                        yield path, name


def _modules(node: ast.ImportFrom) -> Iterator[str]:
    """What `from modaldummy import ...` imports: modules by name, public names as "__init__"."""
    for alias in node.names:
        is_module = (SOURCE / alias.name).is_dir() or (SOURCE / f"{alias.name}.py").is_file()
        yield alias.name if is_module else "__init__"


# --- The picture --------------------------------------------------------------------------------

_WIDTH, _LEFT, _BOX_HEIGHT = 960, 20, 44
# Boxes of a pipeline that a step goes through, in this order.
_PIPELINE = ("batch", "parameter_map", "term", "report")
_BELOW = {
    "batch": ("batch_values",),
    "parameter_map": ("paths", "parameter"),
    "term": ("reduce", "triton_kernels"),
    "report": (),
}


def draw() -> str:
    """The picture, as SVG: four rows, in which what is above may import what is below."""
    parts = [
        *_row("for users to start", list(ENTRY_POINTS)[::-1], 20),
        *_arrow(480, 88, 480, 112),
        *_row("add-ons, and what they share", list(ADD_ONS)[::-1], 110),
        *_row("", list(_SHARED), 160),
        *_arrow(480, 228, 480, 252),
        f'<rect class="core" x="{_LEFT}" y="254" width="920" height="262" rx="8"/>',
        *_text(
            _LEFT + 10, 272, "_core: what runs in a loss, numbered in the order of one step", "l"
        ),
        *_core(),
        *_arrow(480, 516, 480, 540),
        *_row("for all", ["_engines", "_errors"], 536),
    ]
    return "\n".join([_HEAD, *parts, "</svg>\n"])


def _row(title: str, names: list[str], y: int) -> Iterator[str]:
    yield from _text(_LEFT, y + 12, title, "l")
    step = (_WIDTH - 2 * _LEFT) // len(names)
    for index, name in enumerate(names):
        yield from _box(name, SAYS[name], _LEFT + index * step, y + 20, step - 10)


def _core() -> Iterator[str]:
    yield from _box("wrapper", CORE["wrapper"], 350, 284, 260)
    yield from _box("loss_function", CORE["loss_function"], 40, 284, 205)
    yield from _box("graph", CORE["graph"], 715, 284, 205)
    yield from _arrow(348, 306, 247, 306)
    for index, name in enumerate(_PIPELINE):
        x = 40 + index * 225
        yield from _box(f"{index + 1}. {name}", CORE[name], x, 354, 205)
        yield from _arrow(480, 328, x + 102, 352)
        for number, below in enumerate(_BELOW[name]):
            yield from _box(below, CORE[below], x, 408 + 50 * number, 205)


def _box(name: str, says: str, x: int, y: int, width: int) -> Iterator[str]:
    yield f'<rect class="box" x="{x}" y="{y}" width="{width}" height="{_BOX_HEIGHT}" rx="5"/>'
    yield from _text(x + width // 2, y + 18, name, "name")
    yield from _text(x + width // 2, y + 35, says, "says")


def _text(x: int, y: int, text: str, kind: str) -> Iterator[str]:
    yield f'<text class="{kind}" x="{x}" y="{y}">{text}</text>'


def _arrow(x: int, y: int, to_x: int, to_y: int) -> Iterator[str]:
    yield f'<path class="arrow" d="M{x} {y} L{to_x} {to_y}"/>'


_HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 612" font-family="sans-serif">
<style>
  text { font-size: 13px; text-anchor: middle; fill: #1b1b1b }
  .says, .l { font-size: 11.5px; fill: #5a5a5a }
  .l { text-anchor: start }
  .box { fill: #ffffff; stroke: #7a8793 }
  .core { fill: #eaf2f9; stroke: #1c6dab }
  .arrow { stroke: #55606a; fill: none; marker-end: url(#head) }
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="8" markerHeight="8"
  orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#55606a"/></marker></defs>
<rect width="960" height="612" fill="#fbfbfb"/>"""


if __name__ == "__main__":
    PICTURE.write_text(draw())
