"""Importing the package costs next to nothing beyond torch, and needs nothing else."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import modaldummy

OPTIONAL = (
    "nibabel",
    "dipy",
    "matplotlib",
    "rich",
    "hypothesis",
    "pytest",
    "transformers",
    "lightning",
    "accelerate",
    "triton",
    "scipy",
    "pandas",
    "tensorboard",
    "wandb",
    "modaldummy.demo",
)
# They take long to import, and torch leaves them out until they are needed.
SLOW = ("torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.testing", "sympy")


def modules_after(statements: str) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after these statements."""
    code = f"{statements}\nimport sys; print('\\n'.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return set(result.stdout.split())


@pytest.fixture(scope="module")
def torch_alone() -> set[str]:
    return modules_after("import torch, numpy")


def added(statements: str, torch_alone: set[str]) -> set[str]:
    return modules_after(statements) - torch_alone


def unwanted(modules: set[str]) -> set[str]:
    return {
        module
        for module in modules
        if any(module == name or module.startswith(f"{name}.") for name in OPTIONAL + SLOW)
    }


def test_import_pulls_in_nothing_optional_or_slow(torch_alone: set[str]) -> None:
    modules = added("import modaldummy", torch_alone)
    assert "modaldummy._core.wrapper" in modules
    assert unwanted(modules) == set()


def test_the_doctor_and_preflight_are_loaded_at_first_use() -> None:
    def parts(statements: str) -> set[str]:
        loaded = modules_after(statements)
        return {part for part in ("_diagnose", "_preflight") if f"modaldummy.{part}" in loaded}

    assert parts("import modaldummy") == set()
    assert parts("import modaldummy; modaldummy.preflight") == {"_preflight"}
    assert parts("from modaldummy import diagnose; assert callable(diagnose)") == {"_diagnose"}
    with pytest.raises(AttributeError, match="'modaldummy' has no attribute 'nothing'"):
        modaldummy.nothing


def test_import_adds_only_itself_and_the_standard_library(torch_alone: set[str]) -> None:
    tops = {module.partition(".")[0] for module in added("import modaldummy", torch_alone)}
    assert tops <= {"modaldummy", "torch", "numpy"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", ["hypothesis", "rich", "modaldummy.demo", "torch._dynamo"])
def test_the_test_can_fail(name: str, torch_alone: set[str]) -> None:
    """An import of something optional or slow beside ours is noticed."""
    assert name in unwanted(added(f"import modaldummy, {name}", torch_alone))


def test_all_is_what_there_is() -> None:
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


def test_the_kit_says_what_it_needs() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import modaldummy.testing"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert "pip install modaldummy[testing]" in result.stderr
