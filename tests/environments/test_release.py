"""The release check finds what it looks for; the check itself is a script, tests/environments/release.py."""

from __future__ import annotations

import importlib.util
import tarfile
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "release.py"
spec = importlib.util.spec_from_file_location("release_check", SCRIPT)
assert spec is not None and spec.loader is not None
release = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release)

PATHS = release.machine_paths(Path("/builds/me/mmhooks"), Path("/root"))


def wheel(folder: Path, **more: bytes) -> Path:
    """A wheel with what a good one has, and ``more``, whose names have __ for a slash."""
    path = folder / "mmhooks-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name in (*release.NEEDED, "mmhooks-0.1.0.dist-info/licenses/LICENSE"):
            file.writestr(name, b"x")
        for name, content in more.items():
            file.writestr(name.replace("__", "/"), content)
    return path


def test_a_good_wheel_has_no_faults(tmp_path: Path) -> None:
    fine = b"see mmhooks/builds/x, https://a.example/home/b, ~/root/x and /data/x"
    assert release.faults_of_wheel(wheel(tmp_path, **{"mmhooks__a.py": fine}), PATHS) == []


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("mmhooks__tests__a.py", b"", "expected no tests"),
        ("mmhooks__heads__test_a.py", b"", "expected no tests"),
        ("mmhooks__conftest.py", b"", "expected no tests"),
        ("recipes__a.py", b"", "expected files of mmhooks alone"),
        ("mmhooks__a.json", b'{"store": "/builds/you/acts"}', "contains the path '/builds/y'"),
        ("mmhooks__a.bin", b"\x00\xff=/home/me/x\x00", "contains the path '/home/m'"),
        ("mmhooks__a.txt", rb"from C:\Users\me", "contains the path 'C:"),
    ],
)
def test_each_fault_is_found(tmp_path: Path, name: str, content: bytes, fault: str) -> None:
    (found,) = release.faults_of_wheel(wheel(tmp_path, **{name: content}), PATHS)
    assert found.startswith(name.replace("__", "/")) and fault in found


def test_a_large_wheel_and_missing_files_are_found(tmp_path: Path) -> None:
    path = wheel(tmp_path)
    (found,) = release.faults_of_wheel(path, PATHS, max_bytes=path.stat().st_size)
    assert "expected fewer than" in found
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("mmhooks/__init__.py", b"")
    missing = release.faults_of_wheel(path, PATHS)
    assert len(missing) == len(release.NEEDED) + 1 and all("missing" in fault for fault in missing)


def test_a_source_archive_is_looked_into(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("written in /builds/me/mmhooks")
    path = tmp_path / "mmhooks-0.1.0.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        file.add(tmp_path / "a.txt", "mmhooks-0.1.0/a.txt")
        file.add(SCRIPT, "mmhooks-0.1.0/tests/environments/release.py")
    (found,) = release.faults_of_source(path, PATHS)
    assert found.startswith("mmhooks-0.1.0/a.txt: contains the path '/builds/m'")
    assert len(release.faults_of_source(path, PATHS, max_bytes=10)) == 2


def test_no_command_sees_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "here")
    monkeypatch.setenv("MMHOOKS_CACHE", "there")
    env = release.environment(tmp_path)
    assert "PYTHONPATH" not in env and Path(env["MMHOOKS_CACHE"]).parent == tmp_path


def test_a_step_that_fails_ends_the_check_with_its_output(tmp_path: Path) -> None:
    import sys

    command = [sys.executable, "-c", "import sys; print('why'); sys.exit(3)"]
    with pytest.raises(SystemExit, match="why"):
        release.step("a step", command, tmp_path, release.environment(tmp_path))
    assert release.step(
        "another", [sys.executable, "-c", "print(1)"], tmp_path, release.environment(tmp_path)
    )
