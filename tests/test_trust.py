"""What is trusted: declared dependencies alone, no code from files, nothing sent on import; by the source and by trying."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "mmhooks").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")])
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normal(requirement: str) -> str:
    """The distribution's name in the form in which indices compare it."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level packages that a file imports, wherever in it, and the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0], node.lineno


def test_every_import_is_a_declared_dependency() -> None:
    declared = {normal(d) for d in PROJECT["dependencies"]}
    optional = {
        normal(d) for name in ("tensorboard", "hdf5", "train") for d in PROJECT["optional-dependencies"][name]
    }
    owners, own = packages_distributions(), {"mmhooks", "embedded", "publish", "_typeshed"}
    missing = {}
    for path in SOURCES:
        for name, line in imports(path):
            if name in sys.stdlib_module_names or name in own:
                continue
            if not {normal(o) for o in owners.get(name, [name])} & (declared | optional):
                missing[f"{path.relative_to(ROOT)}:{line}"] = name
    assert missing == {}


# What mmhooks was asked to build on, as it is imported.
ASKED_FOR = (
    "torch", "transformer_lens", "nnsight", "open_clip", "einops", "jaxtyping", "diffusers", "sentence_transformers",
    "datasets",
)  # fmt: skip


def imported() -> set[str]:
    """Top-level packages that mmhooks itself imports."""
    package = [path for path in SOURCES if path.is_relative_to(ROOT / "mmhooks")]
    return {name for path in package for name, _ in imports(path)}


@pytest.mark.parametrize("package", ASKED_FOR)
def test_what_was_asked_for_is_used(package: str) -> None:
    assert package in imported()


def test_every_declared_dependency_is_used() -> None:
    owners = packages_distributions()
    used = {normal(owner) for name in imported() for owner in owners.get(name, [name])}
    assert {normal(d) for d in PROJECT["dependencies"]} - used == set()


def test_every_benchmark_runs_on_pytest_benchmark() -> None:
    for path in (ROOT / "benchmarks").glob("test_*.py"):
        tests = [
            n
            for n in ast.parse(path.read_text()).body
            if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")
        ]
        assert tests and all("benchmark" in [a.arg for a in n.args.args] for n in tests), path.name


OWN = ("mmhooks", "embedded", "publish", "benchmarks", "race", "peers")


def own_imports(path: Path) -> Iterator[tuple[str, str]]:
    """Module and name of everything that a file imports from this project, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OWN:
            yield from ((node.module or "", alias.name) for alias in node.names)


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda p: p.name)
def test_benchmarks_import_names_that_exist(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks do not run with the tests: a renamed function would be noticed by whoever measures next."""
    for folder in (ROOT, ROOT / "recipes", ROOT / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))
    missing = [
        f"{module}.{name}"
        for module, name in own_imports(path)
        if not hasattr(importlib.import_module(module), name) and not find_spec(f"{module}.{name}")
    ]
    assert missing == []


def calls(*names: str) -> Iterator[tuple[str, ast.Call]]:
    """Calls in the package, the recipes and the benchmarks whose last name is one of these."""
    for path in [*SOURCES, *(ROOT / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in names:
                yield f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)[:90]}", node


def test_torch_load_reads_tensors_alone() -> None:
    loads = [(w, c) for w, c in calls("load") if ast.unparse(c.func) in ("torch.load", "th.load")]
    wrong = [
        w
        for w, c in loads
        if not any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in c.keywords)
    ]
    assert loads and wrong == []


def test_nothing_unpickles_or_evaluates() -> None:
    """No reader that runs what a file says: pickle and its kin, eval, exec, shells."""
    banned_imports = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    found = [
        f"{p.relative_to(ROOT)}:{line} {name}"
        for p in SOURCES
        for name, line in imports(p)
        if name in banned_imports
    ]
    for place, call in calls("eval", "exec", "load", "system", "Popen", "run", "check_output"):
        said = {k.arg: ast.unparse(k.value) for k in call.keywords}
        runs = ast.unparse(call.func) in ("eval", "exec", "os.system", "yaml.load")
        if runs or said.get("allow_pickle", "False") != "False" or said.get("shell", "False") != "False":
            found.append(place)
    assert found == []


def test_no_load_trusts_code_that_comes_with_weights() -> None:
    loads = (
        "from_pretrained",
        "SentenceTransformer",
        "load_dataset",
        "load_dataset_builder",
        "get_tokenizer",
    )
    wrong = [
        place
        for place, call in calls(*loads)
        if any(k.arg == "trust_remote_code" and ast.unparse(k.value) != "False" for k in call.keywords)
    ]
    assert wrong == []
    floors = {normal(d): d for d in PROJECT["dependencies"]}
    assert floors["torch"] == "torch>=2.10" and floors["torchvision"] == "torchvision>=0.25"
    assert floors["datasets"] == "datasets>=4.0"  # no loading scripts


def test_nothing_is_sent_on_import_nor_by_the_embedded_model() -> None:
    """Every socket is blocked, name look-ups too, and whatever tries is told."""
    script = """
import socket, sys

def blocked(self, *a, **k):
    if getattr(self, "family", None) == getattr(socket, "AF_UNIX", -1):
        raise OSError("no socket here")
    sys.exit(f"something was sent: {a}")

for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, blocked)
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = blocked
import mmhooks as mm
for name in mm.__all__:
    getattr(mm, name)
model = mm.load("mini")
mm.load_head("mini/sae")
print(tuple(model.encode_text(model.tokenizer(["a cat"])).shape))
"""
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert out.returncode == 0 and out.stdout.strip() == "(1, 256)", out.stdout + out.stderr
