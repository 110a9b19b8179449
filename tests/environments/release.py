"""The check of a release: the wheel is built, looked into, installed alone and run outside the checkout.

    python tests/environments/release.py --limit 64

It needs Python and pip alone: ``build`` and mmhooks go into environments of their own, in a folder that is removed
afterwards unless ``--work`` names one. The exit code is 0 if every step passed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The package index takes 100 MB a file.
MAX_BYTES = 95_000_000
STUDIES = ("modality", "gender")
# Files without which an installation is not complete: types, licence, and weights of each embedded model.
NEEDED = (
    "mmhooks/__init__.pyi",
    "mmhooks/py.typed",
    "mmhooks/assets/digests.json",
    "mmhooks/assets/mini/model.safetensors",
    "mmhooks/assets/mini/sae/model.safetensors",
)
# This check and its tests hold paths of no machine, to look for such.
ON_PURPOSE = ("/tests/environments/release.py", "/tests/environments/test_release.py")


def machine_paths(root: Path, home: Path) -> re.Pattern[bytes]:
    """Builds the pattern of paths that exist on the building machine alone.

    Args:
        root: the checkout; its top folder is looked for, so that a path beside it is found too.
        home: of the user who builds.

    >>> found = machine_paths(Path("/build/me/mmhooks"), Path("/root"))
    >>> [bool(found.search(text)) for text in (b"at /build/other", b"in mmhooks/build/x", b"/home/you/x", b"a/b")]
    [True, False, True, False]
    """
    tops = {path.parts[1] for path in (root, home) if len(path.parts) > 1} | {"home", "Users", "root"}
    names = "|".join(re.escape(top) for top in sorted(tops))
    # A separator at the front that follows a name, such as mmhooks/data/, does not begin a path.
    return re.compile(rf"(?<![\w.\-/~>}}\])])/(?:{names})/\w|[A-Z]:\\Users\\\w".encode())


def is_a_test(name: str) -> bool:
    """Whether a file of an archive belongs to the tests."""
    *folders, file = name.split("/")
    return "tests" in folders or file.startswith("test_") or file == "conftest.py"


def faults_of_wheel(path: Path, paths: re.Pattern[bytes], max_bytes: int = MAX_BYTES) -> list[str]:
    """Says what in a wheel must not be published: its size, tests, strangers, machine paths, missing files.

    Args:
        paths: what no file may contain (:func:`machine_paths`).

    Returns:
        One sentence a fault; none if the wheel is good.
    """
    faults = []
    if (size := path.stat().st_size) >= max_bytes:
        faults.append(
            f"{path.name}: expected fewer than {max_bytes:,} bytes, got {size:,}; ship fewer weights"
        )
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        for name in names:
            top = name.split("/")[0]
            if top != "mmhooks" and not top.endswith(".dist-info"):
                faults.append(f"{name}: expected files of mmhooks alone; leave it out of the wheel")
            if is_a_test(name) or "__pycache__" in name:
                faults.append(f"{name}: expected no tests and no caches; leave it out of the wheel")
            if match := paths.search(wheel.read(name)):
                faults.append(
                    f"{name}: contains the path {match.group().decode()!r}… of this machine; remove it"
                )
    faults += [f"{name} is missing; include it in the wheel" for name in NEEDED if name not in names]
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        faults.append("the licence is missing; include it in the wheel")
    return faults


def faults_of_source(path: Path, paths: re.Pattern[bytes], max_bytes: int = MAX_BYTES) -> list[str]:
    """Says what in a source archive must not be published: its size, machine paths.

    Args:
        paths: what no file may contain (:func:`machine_paths`).

    Returns:
        One sentence a fault; none if the archive is good.
    """
    faults = []
    if (size := path.stat().st_size) >= max_bytes:
        faults.append(
            f"{path.name}: expected fewer than {max_bytes:,} bytes, got {size:,}; ship fewer weights"
        )
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is None or member.name.endswith(ON_PURPOSE):
                continue
            if match := paths.search(file.read()):
                faults.append(
                    f"{member.name}: contains the path {match.group().decode()!r}… of this machine; remove it"
                )
    return faults


def environment(work: Path) -> dict[str, str]:
    """The variables of every command: no path into the checkout, no network of the Hub, a fresh cache."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "MMHOOKS"))}
    return kept | {"MMHOOKS_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1"}


def step(title: str, command: list[str | Path], cwd: Path, env: dict[str, str]) -> str:
    """Runs a command and says how long it took; ends the check with the command's output if it fails."""
    start = time.perf_counter()
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    print(f"{'passed' if done.returncode == 0 else 'FAILED'}  {seconds:7.1f} s  {title}", flush=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
    return done.stdout


def new_environment(path: Path) -> Path:
    """Makes a virtual environment and returns its folder of commands."""
    venv.EnvBuilder(with_pip=True).create(path)
    return path / ("Scripts" if os.name == "nt" else "bin")


def build(work: Path, env: dict[str, str]) -> tuple[Path, Path]:
    """Builds the source archive, and from it the wheel; returns both."""
    tools = new_environment(work / "tools")
    step("pip install build", [tools / "python", "-m", "pip", "install", "-q", "build"], work, env)
    command = [tools / "python", "-m", "build", "--outdir", work / "dist", ROOT]
    step("python -m build: the source archive, and the wheel from it", command, work, env)
    sources, wheels = list((work / "dist").glob("*.tar.gz")), list((work / "dist").glob("*.whl"))
    if len(sources) != 1 or len(wheels) != 1:
        sys.exit(
            f"expected one archive and one wheel, got {len(sources)} and {len(wheels)}; name an empty --work"
        )
    return sources[0], wheels[0]


def run_study(commands: Path, name: str, limit: int, away: Path, env: dict[str, str]) -> None:
    """Runs a study by the installed command and checks that its page and its results were written."""
    command = [commands / "mmhooks", "study", name, "--limit", str(limit), "--out", name]
    shown = step(f"mmhooks study {name} --limit {limit}", command, away, env)
    page, results = away / name / "index.html", away / name / "results.json"
    if not page.is_file() or not isinstance(json.loads(results.read_text(encoding="utf-8")), dict):
        sys.exit(
            f"mmhooks study {name}: expected {page.name} and {results.name} in --out; it printed\n{shown}"
        )
    print(f"    {page.stat().st_size:,} bytes of {page.name}; the last lines it printed:")
    print("\n".join(f"    | {line}" for line in shown.rstrip().splitlines()[-6:]), flush=True)


def check(work: Path, limit: int) -> None:
    """Runs all steps in ``work``; ends with a message at the first that fails."""
    env = environment(work)
    source, wheel = build(work, env)
    for file in (source, wheel):
        print(f"    {file.name}: {file.stat().st_size:,} bytes, allowed {MAX_BYTES:,}", flush=True)
    paths = machine_paths(ROOT, Path.home())
    if faults := faults_of_source(source, paths) + faults_of_wheel(wheel, paths):
        sys.exit("\n".join(faults))
    print(
        "passed             the wheel holds the package alone, without tests; no machine paths in either",
        flush=True,
    )

    commands, away = new_environment(work / "clean"), work / "away"
    away.mkdir(exist_ok=True)
    python = commands / "python"
    step("pip install of the wheel, alone", [python, "-m", "pip", "install", "-q", wheel], away, env)
    step("pip check", [python, "-m", "pip", "check"], away, env)
    asked = "import mmhooks; print(mmhooks.__version__, mmhooks.__file__)"
    version, file = step("import mmhooks", [python, "-c", asked], away, env).split()
    if not Path(file).resolve().is_relative_to((work / "clean").resolve()):
        sys.exit(f"expected mmhooks of the clean environment, got {file}; unset what leads there")
    if wheel.name.split("-")[1] != version:
        sys.exit(f"expected version {wheel.name.split('-')[1]} as the wheel is named, got {version}")
    for name in STUDIES:
        run_study(commands, name, limit, away, env)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--limit", type=int, default=64, help="pairs of each study")
    parser.add_argument(
        "--work", type=Path, help="an empty folder outside the checkout, kept; default: a temporary one"
    )
    options = parser.parse_args()
    if options.work is not None:
        work = options.work.resolve()
        if work.is_relative_to(ROOT):
            sys.exit(f"expected a folder outside the checkout, got {work}; name another")
        work.mkdir(parents=True, exist_ok=True)
        check(work, options.limit)
    else:
        with tempfile.TemporaryDirectory(prefix="mmhooks-release-") as folder:
            check(Path(folder).resolve(), options.limit)


if __name__ == "__main__":
    main()
