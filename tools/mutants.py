"""Break the core in every way that a small set of rules knows, and see whether a test notices.

Run by `make mutants`; not collected by pytest. Each break is made in a copy of the repository and
the tests of the core are run on it. The exit status is 1 if fewer than 95 % are caught, if one
survives without a reason in `SURVIVORS`, or if a reason there has no survivor any more.
"""

import argparse
import ast
import copy
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import modaldummy
from tools.survivors import SURVIVORS

ROOT = Path(__file__).parents[1]
PACKAGE = Path(modaldummy.__file__).parent
_HOLD = ["hold_window", "hold_owners", "hold_step", "hold_optimizers", "hold_lifetime"]
# File of the core to the tests that are run on it, those that fail soonest first.
TESTS = {
    "_core/term.py": ["term", "wrapper", "kinds", "company", "properties", "compile"],
    "_core/parameter_map.py": ["step", "modalities", "messages", "kinds", "wrapper", "properties"],
    "_core/batch.py": [
        "batch",
        "hostile_batches",
        "messages",
        "call",
        "host_sync",
        "testing/test_strategies",
    ],
    "_hold/trained_keys.py": [*_HOLD, "window", "hold_compile", "distributed/test_hold"],
    "_hold/holder.py": [*_HOLD, "hold", "hold_refusals", "distributed/test_hold"],
    "_preflight/drift.py": ["drift"],
    "_monitor/gradients.py": ["monitor", "missing"],
    "_monitor/norms.py": ["monitor"],
    "_monitor/missing.py": ["missing"],
    "_ranks/attach.py": ["attach"],
}
GOAL = 0.95
TIMEOUT_S = 300

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """One break: where it is, what became what, and the source of the broken file."""

    file: str
    function: str
    line: int
    change: str
    source: str

    @property
    def key(self) -> str:
        return f"{self.file} {self.function}: {self.change}"


def mutants_of(file: str) -> Iterator[Mutant]:
    """All breaks of one file, in order; a repeated key gets a number."""
    tree = ast.parse((PACKAGE / file).read_text())
    seen: dict[str, int] = {}
    for function, node in _sites(tree):
        original = copy.copy(node.__dict__)
        for replacement in _replacements(node):
            before = ast.unparse(node).split("\n")[0]
            node.__dict__.update(replacement.__dict__)
            node.__class__, kept = replacement.__class__, node.__class__
            after = ast.unparse(node).split("\n")[0]
            source = ast.unparse(tree)
            node.__class__ = kept
            node.__dict__.clear()
            node.__dict__.update(original)
            change = f"{before} -> {after}"
            count = seen[f"{function}{change}"] = seen.get(f"{function}{change}", 0) + 1
            change += f" ({count})" if count > 1 else ""
            yield Mutant(file, function, getattr(node, "lineno", 0), change, source)


def _sites(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Every node that may be broken with the name of what it is in; not the text of errors."""

    def walk(node: ast.AST, where: str) -> Iterator[tuple[str, ast.AST]]:
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            where, children = f"{where}.{node.name}".lstrip("."), [*node.body]
        yield where, node
        if not isinstance(node, (ast.Raise, ast.ImportFrom, ast.AnnAssign)):
            for child in children:
                yield from walk(child, where)

    yield from walk(tree, "")


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Compare(ops=[op]) if type(op) in _COMPARISONS:
            yield ast.Compare(node.left, [_COMPARISONS[type(op)]()], node.comparators)
        case ast.BoolOp(op=op, values=values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
            yield from (ast.BoolOp(op, [v for v in values if v is not gone]) for gone in values[:1])
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.BinOp(op=op) if type(op) in _OPERATORS:
            yield ast.BinOp(node.left, _OPERATORS[type(op)](), node.right)
        case ast.Constant(value=bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield ast.Constant(value + 1)
        case ast.Name(id=name) if name in _NAMES:
            yield ast.Name(_NAMES[name], node.ctx)
        case ast.If(test=test, body=body, orelse=orelse):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.IfExp(body=body, orelse=orelse):
            yield body
            yield orelse
        case ast.Call(func=func, args=args, keywords=[_, *_] as keywords):
            for gone in keywords:
                yield ast.Call(func, args, [keyword for keyword in keywords if keyword is not gone])
        case ast.Return(value=ast.expr() as value) if not _is_none(value):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call() | ast.YieldFrom()) | ast.Raise() | ast.AugAssign():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_]):
            yield ast.Pass()
        case ast.comprehension(target=target, iter=source, ifs=[_, *_]):
            yield ast.comprehension(target, source, [], 0)
        case ast.Continue():
            yield ast.Pass()


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def is_caught(mutant: Mutant, workplace: Path) -> bool:
    """Whether the tests fail, or do not end, on the break in a copy of the repository."""
    broken = workplace / "src/modaldummy" / mutant.file
    intact = broken.read_text()
    broken.write_text(mutant.source)
    tests = [f"tests/{n if '/' in n else 'test_' + n}.py" for n in TESTS[mutant.file]]
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile", "mutants"]
    # A cached bytecode file is taken for fresh if size and second of the source are the same.
    environment = {
        **os.environ,
        "PYTHONPATH": str(workplace / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", *options, *tests]
    try:
        result = subprocess.run(
            command, cwd=workplace, env=environment, capture_output=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return True
    finally:
        broken.write_text(intact)
    return result.returncode != 0


def _workplaces(count: int, folder: Path) -> SimpleQueue[Path]:
    places: SimpleQueue[Path] = SimpleQueue()
    for index in range(count):
        place = folder / str(index)
        for part in ("src", "tests", "docs", "benchmarks"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, place / part, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", place)
        places.put(place)
    return places


def run(mutants: list[Mutant], jobs: int) -> list[Mutant]:
    """The mutants that no test notices; each outcome is printed as it comes."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        places = _workplaces(jobs, Path(folder))

        def tested(mutant: Mutant) -> bool:
            place = places.get()
            try:
                return is_caught(mutant, place)
            finally:
                places.put(place)

        def survives(mutant: Mutant) -> bool:
            caught = tested(mutant)
            print(
                f"{'caught' if caught else 'SURVIVED':8} {mutant.line:>4} {mutant.key}", flush=True
            )
            return not caught

        files = {mutant.file: (PACKAGE / mutant.file) for mutant in mutants}
        intact = [Mutant(file, "", 0, "", path.read_text()) for file, path in files.items()]
        if any(pool.map(tested, intact)):
            sys.exit("The tests fail on the code as it is; no break could be told from that.")
        outcomes = list(pool.map(survives, mutants))
    return [mutant for mutant, survived in zip(mutants, outcomes, strict=True) if survived]


def main() -> int:
    """Make the breaks, run the tests on each, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", nargs="+", choices=list(TESTS), default=list(TESTS))
    parser.add_argument("--match", default="", help="only breaks whose key contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="print the breaks and stop")
    arguments = parser.parse_args()
    found = [mutant for file in arguments.files for mutant in mutants_of(file)]
    chosen = [mutant for mutant in found if arguments.match in mutant.key]
    if arguments.list:
        print(*(mutant.key for mutant in chosen), f"{len(chosen)} breaks", sep="\n")
        return 0
    if not chosen:
        parser.error(f"no break matches {arguments.match!r}; `--list` shows them all")
    survivors = run(chosen, arguments.jobs)
    share = 1 - len(survivors) / len(chosen)
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} breaks caught, {share:.1%}")
    keys = {mutant.key for mutant in survivors}
    unexplained = sorted(keys - SURVIVORS.keys())
    stale = sorted({m.key for m in chosen} & SURVIVORS.keys() - keys)
    stale += sorted(
        SURVIVORS.keys() - {mutant.key for file in TESTS for mutant in mutants_of(file)}
    )
    for key in sorted(keys & SURVIVORS.keys()):
        print(f"survives: {key}\n    {SURVIVORS[key]}")
    for key in unexplained:
        print(f"survives without a reason: {key}")
    for key in stale:
        print(f"has a reason, but does not survive: {key}")
    enough = share >= GOAL or arguments.match  # a part may hold most of the survivors
    return 0 if enough and not unexplained and not stale else 1


if __name__ == "__main__":
    sys.exit(main())
