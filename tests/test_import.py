"""Importing the package takes little longer than importing torch, and needs nothing else."""

import functools
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import modaldummy

# Torch loads these only when they are needed, because that takes long; so do we with our own.
LAZY = ("_diagnose", "_preflight", "demo", "testing", "integrations")
SLOW = ("torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.testing")


@functools.cache
def added(statements: str) -> set[str]:
    """Names of the modules that these statements load in a fresh interpreter, beside torch's."""
    code = (
        "import sys, torch, numpy\nbefore = set(sys.modules)\n"
        f"{statements}\nprint(*sys.modules.keys() - before)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return set(result.stdout.split())


def test_import_adds_only_itself_and_the_standard_library() -> None:
    """And nothing that torch loads only when it is needed."""
    modules = added("import modaldummy")
    assert "modaldummy._core.wrapper" in modules
    tops = {module.partition(".")[0] for module in modules}
    assert tops <= {"modaldummy", "torch", "numpy"} | set(sys.stdlib_module_names)
    slow = {module for module in modules if module.startswith(tuple(SLOW))}
    assert slow == set()


@pytest.mark.parametrize(
    ("statements", "parts"),
    [
        ("import modaldummy", set()),
        ("import modaldummy; modaldummy.preflight", {"_preflight"}),
        ("from modaldummy import diagnose; assert callable(diagnose)", {"_diagnose"}),
    ],
)
def test_the_doctor_and_preflight_are_loaded_at_first_use(statements: str, parts: set[str]) -> None:
    loaded = added(statements)
    assert {part for part in LAZY if f"modaldummy.{part}" in loaded} == parts


def test_what_does_not_exist_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="'modaldummy' has no attribute 'nothing'"):
        modaldummy.nothing


def test_public_names_exist_and_are_documented() -> None:
    """Everything in `__all__` exists and is documented, and `dir` offers nothing else."""
    assert {name for name in dir(modaldummy) if not name.startswith("_")} == set(modaldummy.__all__)
    assert list(modaldummy.__all__) == sorted(modaldummy.__all__)
    assert all(getattr(modaldummy, name).__doc__ for name in modaldummy.__all__)


def test_other_peoples_pytest_runs_do_not_load_torch(tmp_path: Path) -> None:
    """Installing the package hands pytest and Hypothesis no plugin, which would import it."""
    plugins = [*entry_points(group="pytest11"), *entry_points(group="hypothesis")]
    assert [plugin for plugin in plugins if plugin.module.startswith("modaldummy")] == []
    test = (
        "def test(): import hypothesis, sys; assert not {'torch', 'modaldummy'} & set(sys.modules)"
    )
    (tmp_path / "test_other.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert "1 passed" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("missing", "module", "packages"),
    [
        ("hypothesis", "testing", "hypothesis"),
        ("transformers", "integrations.transformers", "transformers accelerate"),
        ("accelerate", "integrations.transformers", "transformers accelerate"),
        ("lightning", "integrations.lightning", "lightning"),
    ],
)
def test_a_part_says_which_packages_it_needs(missing: str, module: str, packages: str) -> None:
    code = f"import sys; sys.modules['{missing}'] = None; import modaldummy.{module}"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    words = rf"ModuleNotFoundError: .*{missing}.*\. Install it: pip install {packages}"
    assert re.fullmatch(words, result.stderr.splitlines()[-1])
