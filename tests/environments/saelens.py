"""Builds one environment with mmhooks and the newest SAELens, and runs the checks that both work in it.

By hand, as it needs a package index, minutes, and 7 GB on Linux, most of it torch for CUDA:

    python tests/environments/saelens.py                                      # in a temporary folder, removed after
    python tests/environments/saelens.py --at envs/saelens                    # kept; run again, it is not rebuilt
    python tests/environments/saelens.py --with "transformer-lens==3.0.*"     # one more constraint, or several

What is run: ``pip check``; ``beside_saelens.py`` (both import; heads there and back; what each asks is what is
installed); the README's fifteen lines; and the tests of the TransformerLens view and of the files of heads. The exit
code is that of the first command that failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What pytest's options in pyproject.toml, and the tests below, import.
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "beartype", "hypothesis", "packaging")
TESTS = (
    "tests/environments/beside_saelens.py",
    "tests/test_package.py::test_readme_example_runs",
    "tests/models/test_interop.py",
    "tests/heads/test_formats.py",
)


def build(folder: Path, more: list[str]) -> Path:
    """A virtual environment in ``folder`` with this checkout and SAELens; its interpreter."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    # One call for all: pip then looks for versions that go together, and fails where there are none.
    install = [str(python), "-m", "pip", "install", "-q", "-e", str(ROOT), "sae-lens", *TOOLS, *more]
    subprocess.run(install, check=True)
    return python


def check(python: Path) -> None:
    """Runs the checks in the environment of ``python``; raises CalledProcessError at the first that fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "recipes"), "OMP_NUM_THREADS": "1"}
    for command in (
        ["-m", "pip", "check"],
        ["-m", "pip", "list", "--format=freeze"],
        ["-m", "pytest", "-p", "no:cacheprovider", "-v", *TESTS],
    ):
        subprocess.run([str(python), *command], check=True, cwd=ROOT, env=environment)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--at", type=Path, help="folder of the environment; default: a temporary one")
    parser.add_argument(
        "--with", dest="more", action="append", default=[], help="a further requirement for pip"
    )
    given = parser.parse_args()
    try:
        if given.at is not None:
            check(build(given.at.resolve(), given.more))
            return 0
        with tempfile.TemporaryDirectory(prefix="mmhooks-saelens-") as folder:
            check(build(Path(folder), given.more))
            return 0
    except subprocess.CalledProcessError as error:
        print(f"failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return error.returncode


if __name__ == "__main__":
    sys.exit(main())
