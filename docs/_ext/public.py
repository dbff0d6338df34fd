"""What is public is documented, or the build fails.

Public are the names in `__all__` of the modules below, and what their classes offer under a name
without an underscore: methods, properties, fields, and what `__init__` sets and is not told.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.logging import getLogger

MODULES = [
    "modaldummy",
    "modaldummy.integrations.lightning",
    "modaldummy.integrations.transformers",
    "modaldummy.testing",
]
_logger = getLogger(__name__)


def names_of(module: str) -> list[str]:
    """The public names of a module."""
    names: list[str] = import_module(module).__all__
    return names


def fields_of(cls: type) -> Iterator[str]:
    """Names of the public attributes that instances have of themselves."""
    yield from inspect.get_annotations(cls)
    init = vars(cls).get("__init__")
    if not inspect.isfunction(init):
        return
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(init)))
    except OSError:  # made at run time, as that of a dataclass
        return
    # What is called as an argument is documented as one.
    told = inspect.signature(init).parameters
    for node in ast.walk(body):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            owner, _, name = ast.unparse(node).partition(".")
            if owner == "self" and name not in told:
                yield name


def members_of(cls: type) -> Iterator[tuple[str, bool]]:
    """Names of what a class of ours offers, and whether each has a docstring of its own."""
    for name, value in vars(cls).items():
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if inspect.isfunction(function) or isinstance(value, property):
            yield name, True
    for name in fields_of(cls):
        yield name, False


def gaps(module: ModuleType, documented: set[str]) -> Iterator[str]:
    """What is wrong with the documentation of a module."""
    for name in module.__all__:
        path = f"{module.__name__}.{name}"
        value: Any = getattr(module, name)
        if path not in documented:
            yield f"`{path}` is public, and no page documents it"
        # Not `inspect.getdoc`, which takes that of a base class.
        if not (value.__doc__ or "").strip():
            yield f"`{path}` has no docstring"
        if not inspect.isclass(value):
            continue
        for member, is_code in dict(members_of(value)).items():
            if member.startswith("_"):
                continue
            if is_code and not (vars(value)[member].__doc__ or "").strip():
                yield f"`{path}.{member}` has no docstring"
            elif f"{path}.{member}" not in documented:
                yield f"`{path}.{member}` is public, and no page documents it"


def check(_: Sphinx, env: BuildEnvironment) -> None:
    """Warn of each gap; warnings fail the build."""
    documented = {name for name, *_ in env.domains.python_domain.get_objects()}
    for name in MODULES:
        for gap in gaps(import_module(name), documented):
            _logger.warning("%s", gap, type="public")


def call_by_public_names(_: Sphinx) -> None:
    """Have signatures show `modaldummy.Finding`, not the private module that it lies in."""
    for name in MODULES:
        for public in names_of(name):
            getattr(import_module(name), public).__module__ = name


def setup(app: Sphinx) -> dict[str, bool]:
    """Check once all pages have been read."""
    app.connect("builder-inited", call_by_public_names)
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
