"""Every public name says what it takes, returns and raises, and shows how it is used."""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import modaldummy

SOURCE = Path(modaldummy.__file__).parents[1]
MODULES = ("", ".testing", ".integrations.transformers", ".integrations.lightning")
SECTIONS = ["Args", "Attributes", "Returns", "Raises", "Note"]  # in this order

# A framework calls these, and what is called `on_...`; their class says what they raise.
OF_MIXIN = ("compute_loss", "log", "prediction_step", "training_step")
HOOKS = {f"DummyLossMixin.{name}" for name in OF_MIXIN}
HANDED_OUT = {"AttachHandle", "HoldHandle"}  # no user calls their constructors
WITHOUT_EXAMPLE = {
    "DummyLossCallback": "a Trainer takes too long for a doctest; its page runs one",
    "DummyLossMixin": "the same",
    "GradientNormCallback": "the same",
    "ModalityBatchSampler.batch_size": "it only raises",
    "ModalityBatchSampler.sampler": "only Lightning asks for it",
}


@dataclass(frozen=True)
class Symbol:
    """A public function, class, method or property, as its source has it."""

    node: ast.FunctionDef | ast.ClassDef
    owner: ast.ClassDef | None = None

    @property
    def name(self) -> str:
        return self.node.name if self.owner is None else f"{self.owner.name}.{self.node.name}"

    @property
    def doc(self) -> str:
        return ast.get_docstring(self.node) or ""

    @property
    def is_hook(self) -> bool:
        return self.name in HOOKS or self.node.name.startswith("on_")

    @property
    def is_property(self) -> bool:
        return any(ast.unparse(one) == "property" for one in self.node.decorator_list)

    @property
    def call(self) -> ast.FunctionDef | None:
        """What runs when a user calls it; nothing of ours if that is a dataclass."""
        if isinstance(self.node, ast.FunctionDef):
            return self.node
        inits = (method for method in methods(self.node) if method.name == "__init__")
        return None if self.name in HANDED_OUT else next(inits, None)


def methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    return (item for item in node.body if isinstance(item, ast.FunctionDef))


@cache
def statements(module: str) -> list[ast.stmt]:
    path = SOURCE.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(file.read_text()).body
    # What is imported lazily is imported for type checkers.
    lazy = [inner for node in body if isinstance(node, ast.If) for inner in node.body]
    return body + lazy


def public_names(module: str) -> list[str]:
    texts = map(ast.unparse, statements(module))
    return re.findall(r"'(\w+)'", next(t for t in texts if t.startswith("__all__ = ")))


def definition(module: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    """What a name of a module is, wherever it is imported from."""
    for node in statements(module):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return definition(str(node.module), name)
    raise AssertionError(f"{module} has no {name}")


def symbols(node: ast.FunctionDef | ast.ClassDef) -> Iterator[Symbol]:
    """The definition itself and, of a class, what it offers."""
    yield Symbol(node)
    if isinstance(node, ast.ClassDef):
        for method in methods(node):
            if method.name == "__call__" or not method.name.startswith("_"):
                yield Symbol(method, node)


PUBLIC = {
    symbol.name: symbol
    for module in MODULES
    for name in public_names(f"modaldummy{module}")
    for symbol in symbols(definition(f"modaldummy{module}", name))
}


def entries(doc: str, section: str) -> list[str]:
    """What a section documents: what stands before the colon of each of its entries."""
    body = re.search(rf"^{section}:\n((?:    .*\n|\n)*)", doc + "\n", re.M)
    return re.findall(r"^    (\S[^:]*):", body.group(1), re.M) if body else []


def examples(doc: str) -> list[str]:
    return re.findall(r"^(?:>>>|\.\.\.) (.*)", doc, re.M)


def parameters(function: ast.FunctionDef) -> list[str]:
    """As a docstring has them; those that begin with an underscore take whatever comes."""
    args = function.args
    found = [arg.arg for arg in args.posonlyargs + args.args if arg.arg != "self"]
    found += [f"*{args.vararg.arg}"] if args.vararg else []
    found += [arg.arg for arg in args.kwonlyargs]
    found += [f"**{args.kwarg.arg}"] if args.kwarg else []
    return [name for name in found if not name.lstrip("*").startswith("_")]


def attributes(node: ast.ClassDef) -> set[str]:
    """Public fields of a dataclass, and what methods set."""
    found = {ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign)}
    for item in ast.walk(node):
        if isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store):
            found |= {item.attr} if ast.unparse(item.value) == "self" else set()
    return {name for name in found if not name.startswith("_")}


def raised(function: ast.FunctionDef) -> set[str]:
    """Classes of the errors that a function itself raises."""
    calls = (node.exc for node in ast.walk(function) if isinstance(node, ast.Raise))
    names = {ast.unparse(call.func) for call in calls if isinstance(call, ast.Call)}
    # A function of ours that makes the error that it is called after.
    return {"UnknownModalityError" if name == "unknown_modality" else name for name in names}


Check = Callable[[Symbol], Iterator[str]]


def check_docstring(symbol: Symbol) -> Iterator[str]:
    if not symbol.doc:
        yield "no docstring"


def check_args(symbol: Symbol) -> Iterator[str]:
    documented = entries(symbol.doc, "Args")
    expected = parameters(symbol.call) if symbol.call and not symbol.is_hook else []
    if documented != expected:
        yield f"Args are {documented}, parameters {expected}"


def check_attributes(symbol: Symbol) -> Iterator[str]:
    if isinstance(symbol.node, ast.ClassDef):
        documented, there = set(entries(symbol.doc, "Attributes")), attributes(symbol.node)
        if not documented <= there <= documented.union(entries(symbol.doc, "Args")):
            yield f"Attributes are {sorted(documented)}, those of an object {sorted(there)}"


def check_returns(symbol: Symbol) -> Iterator[str]:
    if isinstance(symbol.node, ast.ClassDef) or symbol.is_property or symbol.is_hook:
        return
    nothing = symbol.node.returns is not None and ast.unparse(symbol.node.returns) == "None"
    if nothing == bool(re.search("^Returns:$", symbol.doc, re.M)):
        yield "Returns where nothing is returned" if nothing else "no Returns"


def check_raises(symbol: Symbol) -> Iterator[str]:
    """A property has it in its sentence."""
    owner = symbol.owner if symbol.is_hook and symbol.owner else symbol.node
    documented = entries(ast.get_docstring(owner) or "", "Raises")
    for name in sorted(raised(symbol.call) if symbol.call else ()):
        if name not in (symbol.doc if symbol.is_property else documented):
            yield f"{name} is raised, Raises has {documented}"


def check_example(symbol: Symbol) -> Iterator[str]:
    """A method may be shown in the docstring of its class."""
    if symbol.is_hook or symbol.name.endswith("Error"):
        return
    shown = examples(symbol.doc)
    if symbol.owner is not None:
        own = examples(ast.get_docstring(symbol.owner) or "")
        shown += [line for line in own if f".{symbol.node.name}" in line]
    if not shown and not {symbol.name, symbol.name.partition(".")[0]} & WITHOUT_EXAMPLE.keys():
        yield "no example"


def check_form(symbol: Symbol) -> Iterator[str]:
    """Code is in double backticks; sections have the usual names, and their order."""
    if "`" in re.sub(r"``.+?``|:math:`.+?`", "", symbol.doc, flags=re.S):
        yield "a single backtick"
    found = re.findall(r"^([A-Z]\w+):$", symbol.doc, re.M)
    if found != [section for section in SECTIONS if section in found]:
        yield f"the sections are {found}, expected some of {SECTIONS}"
    if re.search(r"^ +>>>", symbol.doc, re.M):
        yield "an indented example, which would be shown as a quotation"
    if symbol.is_property and ":" in symbol.doc.partition("\n")[0]:
        yield "a colon, before which Sphinx expects a type"


CHECKS = (
    *(check_docstring, check_args, check_attributes, check_returns),
    *(check_raises, check_example, check_form),
)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstring(name: str) -> None:
    assert [problem for check in CHECKS for problem in check(PUBLIC[name])] == []


def test_everything_public_is_found() -> None:
    """Also what is called, read or imported; and exceptions are of what is there."""
    some = {"DummyLossWrapper.__call__", "StepReport.fraction", "GradientNormCallback", "scales"}
    assert PUBLIC.keys() >= HOOKS | some | HANDED_OUT | WITHOUT_EXAMPLE.keys()
    assert [name for name in WITHOUT_EXAMPLE if examples(PUBLIC[name].doc)] == []


SAMPLE = '''
class Pair:
    """Two things, ``one`` and another.

    >>> Pair(1).size

    Args:
        one: The one.

    Attributes:
        other: The other.
    """

    def __init__(self, one: int) -> None:
        self.one = self.other = one

    @property
    def size(self) -> int:
        """How many, for ``Pair().size``."""

    def halve(self, number: float, *, name: str = "", **rest: float) -> float:
        """Half.

        >>> halve(2.0)
        1.0

        Args:
            number: Any
                kind: of any.
            name: Of it.
            **rest: Others.

        Returns:
            The half.

        Raises:
            ValueError: It is none.
        """
        raise ValueError("no number")
'''
BROKEN = {
    "no docstring": (check_docstring, '"""How many, for ``Pair().size``."""', "..."),
    "a parameter too few": (check_args, "            name: Of it.\n", ""),
    "a parameter too many": (check_args, "name: Of it.", "name: Of it.\n            more: All."),
    "a parameter of a constructor": (check_args, "        one: T", "        two: T"),
    "an attribute that is gone": (check_attributes, "other: T", "third: T"),
    "an attribute too few": (check_attributes, "self.one =", "self.one = self.third ="),
    "a field too few": (check_attributes, "    @property", "    third: int\n    @property"),
    "no Returns": (check_returns, "Returns:", "Return:"),
    "Returns of nothing": (check_returns, "-> float", "-> None"),
    "no Raises": (check_raises, "Raises:", "Raise:"),
    "another error": (check_raises, "raise ValueError", "raise TypeError"),
    "an error that is made elsewhere": (check_raises, "raise ValueError", "raise unknown_modality"),
    "an error of a constructor": (check_raises, "self.one =", "raise ValueError()\n        a ="),
    "no example": (check_example, ">>> halve", "halve"),
    "no example of a method": (check_example, ".size\n", "\n"),
    "single backticks": (check_form, "``one``", "`one`"),
    "an unknown section": (check_form, "Returns:", "Gives:"),
    "sections in another order": (check_form, "Returns:", "Note:"),
    "an indented example": (check_form, ">>> Pair", "    >>> Pair"),
    "a property of no type": (check_form, "How many, for", "How many: for"),
}


def problems(check: Check, source: str) -> list[str]:
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.ClassDef)
    return [problem for symbol in symbols(node) for problem in check(symbol)]


def test_what_is_whole_passes() -> None:
    assert [problem for check in CHECKS for problem in problems(check, SAMPLE)] == []


@pytest.mark.parametrize(("check", "old", "new"), BROKEN.values(), ids=BROKEN.keys())
def test_the_checks_can_fail(check: Check, old: str, new: str) -> None:
    assert SAMPLE.count(old) == 1
    assert problems(check, SAMPLE.replace(old, new))
