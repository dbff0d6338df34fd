"""No file of ours runs what it reads, none of the library goes online, and few of it write."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import modaldummy

ROOT = Path(__file__).parents[1]
PACKAGE = Path(modaldummy.__file__).parent
# Modules, functions and all below them. They turn data into code, or text into commands.
CODE = (
    *("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle", "copyreg"),
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__", "runpy", "code"),
    *("importlib.import_module", "importlib.machinery", "pydoc.locate", "pkgutil.resolve_name"),
    *("os.system", "os.popen", "os.posix_spawn", "pty", "commands"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader"),
    *("yaml.UnsafeLoader", "yaml.FullLoader", "pandas.read_pickle", "pandas.eval", "torch.hub"),
    *("numpy.load", "torch.serialization", "torch.package", "numexpr"),
)
# Others, which the library has no need for.
OUTSIDE = (
    *("subprocess", "multiprocessing", "socket", "socketserver", "ssl", "urllib", "urllib3"),
    *("http", "ftplib", "smtplib", "telnetlib", "xmlrpc", "requests", "httpx", "aiohttp"),
    *("huggingface_hub", "webbrowser", "ctypes", "cffi", "tempfile", "shutil"),
)
# Keywords of calls, and the only values that are no danger.
KEYWORDS = {"shell": False, "allow_pickle": False, "trust_remote_code": False}
ALLOWED = {
    ("benchmarks/measure.py", "os.execve"): "itself again, with another allocator",
}
WRITING = (
    r"\.(write_text|write_bytes|mkdir|touch|unlink|rename|symlink_to|savefig|tofile|to_csv)"
    r"|os\.(open|makedirs|mkdir|remove|rename|replace|unlink|rmdir|link|symlink|truncate)"
    r"|(torch|numpy)\.save\w*"
)
WRITES = {
    "__main__.py": "the null device, where nobody reads its output any more",
    "_diagnose/picture.py": "the picture that `--plot` names",
    "demo/command.py": "the folder that `--out` names, or `demo-output` below the current one",
}


def sources(folder: str) -> dict[str, str]:
    """Paths, as in the repository, to sources; those of the library from where it is installed."""
    top = PACKAGE if folder == "src/modaldummy" else ROOT / folder
    paths = sorted(top.rglob("*.py"))
    assert len(paths) > 5
    return {f"{folder}/{path.relative_to(top).as_posix()}": path.read_text() for path in paths}


def names(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Full names of all that is imported, named or called, whatever it is called here."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}", node
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            yield full_name(node, known), node
        elif isinstance(node, ast.Call):
            yield full_name(node.func, known) + "()", node


def full_name(node: ast.expr, known: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, known)}.{node.attr}"
    return known.get(node.id, f"builtins.{node.id}") if isinstance(node, ast.Name) else ""


def dangers(source: str, forbidden: tuple[str, ...]) -> set[str]:
    """What of `forbidden` the source uses, and calls that open a door."""
    pattern = re.compile(rf"({'|'.join(map(re.escape, forbidden))}|os\.(exec|spawn)\w+)(\.|$)")
    found = set()
    for name, node in names(ast.parse(source)):
        if match := pattern.match(name):
            found.add(match.group(1))
        if isinstance(node, ast.Call):
            given = {key.arg: getattr(key.value, "value", ...) for key in node.keywords}
            found |= {key for key, safe in KEYWORDS.items() if given.get(key, safe) is not safe}
            if name == "torch.load()" and given.get("weights_only") is not True:
                found.add("torch.load")
    return found


def writes(source: str) -> set[str]:
    """Calls that make, change or remove a file."""
    found = set()
    for name, node in names(ast.parse(source)):
        if isinstance(node, ast.Call):
            place = 1 if name == "builtins.open()" else 0
            mode = [key.value for key in node.keywords if key.arg == "mode"] + node.args[place:]
            text = str(getattr(mode[0], "value", "w")) if mode else "r"
            opens = name.endswith(".open()") and name != "os.open()" and not set("wax+") & set(text)
            if not opens and (name.endswith(".open()") or re.search(rf"({WRITING})\(\)$", name)):
                found.add(name)
    return found


@pytest.mark.parametrize("folder", ["src/modaldummy", "examples", "benchmarks"])
def test_nothing_runs_what_it_reads(folder: str) -> None:
    found = {
        (path, danger)
        for path, source in sources(folder).items()
        for danger in dangers(source, CODE)
    }
    assert found == {place for place in ALLOWED if place[0].startswith(folder)}


def test_the_library_neither_goes_online_nor_starts_processes() -> None:
    found = {path: dangers(source, OUTSIDE) for path, source in sources("src/modaldummy").items()}
    assert {path: names for path, names in found.items() if names} == {}


def test_few_files_of_the_library_write() -> None:
    """Where they are told to, and nowhere else."""
    found = {path for path, source in sources("src/modaldummy").items() if writes(source)}
    assert found == {f"src/modaldummy/{path}" for path in WRITES}


PLANTED = {
    "import pickle": "pickle",
    "import pickle as p": "pickle",
    "from pickle import loads": "pickle",
    "def f():\n    import marshal": "marshal",
    "from os import system as run\nrun('ls')": "os.system",
    "import os\nos.system('ls')": "os.system",
    "import os as o\nrun = o.popen": "os.popen",
    "import os\nos.execvp('ls', ['ls'])": "os.execvp",
    "eval('1')": "builtins.eval",
    "run = exec": "builtins.exec",
    "__import__('os')": "builtins.__import__",
    "import importlib\nimportlib.import_module(name)": "importlib.import_module",
    "from importlib import import_module": "importlib.import_module",
    "import subprocess\nsubprocess.run('ls', shell=True)": "shell",
    "from subprocess import Popen\nPopen('ls', shell=flag)": "shell",
    "import torch\ntorch.load(path)": "torch.load",
    "import torch\ntorch.load(path, weights_only=False)": "torch.load",
    "from torch import load\nload(path, weights_only=flag)": "torch.load",
    "import yaml\nyaml.load(text, yaml.SafeLoader)": "yaml.load",
    "import numpy as np\nnp.load(path)": "numpy.load",
    "read(path, allow_pickle=True)": "allow_pickle",
}


@pytest.mark.parametrize(("source", "danger"), PLANTED.items(), ids=PLANTED)
def test_a_planted_use_is_found(source: str, danger: str) -> None:
    assert danger in dangers(source, CODE)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import re\nre.compile('a')",
        "import torch\ntorch.compile(model)\ntorch.load(path, weights_only=True)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "import yaml\nyaml.safe_load(text)",
        "import json\njson.loads(text)",
    ],
)
def test_what_only_resembles_one_is_not(source: str) -> None:
    assert dangers(source, CODE) == set()


@pytest.mark.parametrize(
    "source", ["import socket", "from urllib.request import urlopen", "import subprocess as s"]
)
def test_a_planted_way_out_is_found(source: str) -> None:
    assert dangers(source, OUTSIDE)


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("open(path, 'w')", 1),
        ("open(path, mode=mode)", 1),
        ("path.open('a')", 1),
        ("path.write_text('')", 1),
        ("import torch\ntorch.save(model, path)", 1),
        ("import os\nos.remove(path)\nhandle.remove()", 1),
        ("open(path)\nopen(path, 'rb')\npath.open()\npath.read_text()", 0),
    ],
)
def test_a_planted_write_is_found(source: str, number: int) -> None:
    assert len(writes(source)) == number
