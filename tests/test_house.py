"""The house as a whole: what it stands on is used, its style is checked, its documentation builds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The packages that mmhooks was asked to build on, as they are imported; pytest-benchmark runs benchmarks/.
PACKAGES = (
    "torch", "transformer_lens", "nnsight", "open_clip", "einops", "jaxtyping", "diffusers", "sentence_transformers",
    "datasets",
)  # fmt: skip


def imported() -> set[str]:
    """Top-level modules that any file of the package imports, wherever in the file."""
    names: set[str] = set()
    for path in (ROOT / "mmhooks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_used(package: str) -> None:
    assert package in imported()


def test_every_declared_dependency_is_used_and_benchmarks_run_on_pytest_benchmark() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {re.split(r"[\[<>=!~ ]", d)[0].lower().replace("-", "_") for d in project["dependencies"]}
    modules = {
        "open_clip_torch": "open_clip",
        "pillow": "PIL",
        "scikit_learn": "sklearn",
        "transformer_lens": "transformer_lens",
    }
    unused = {n for n in named if modules.get(n, n) not in imported()}
    assert unused == set()
    assert any(
        "benchmark" in p.read_text() and "def test_" in p.read_text()
        for p in (ROOT / "benchmarks").glob("test_*.py")
    )


def test_formatting() -> None:
    command = [sys.executable, "-m", "ruff", "format", "--no-cache", "--check", "."]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(tmp_path / "html")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "html" / "reference" / "hooks.html").exists()
