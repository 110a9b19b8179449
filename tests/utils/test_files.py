"""The one writer: whole or not at all, permissions by the umask, every failure one of ours."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmhooks.errors import CannotWrite
from mmhooks.utils import files
from mmhooks.utils.files import atomic_path, make_folder, write_atomic, write_bytes, write_text


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
@pytest.mark.parametrize("through", ["aside", "bytes", "safetensors"])
def test_permissions_follow_the_umask(tmp_path, umask, through):
    path, before = tmp_path / "x", os.umask(umask)
    try:
        if through == "bytes":
            write_bytes(path, b"x")
        else:
            with atomic_path(path) as aside:
                if through == "aside":
                    aside.write_text("x")
                else:
                    save_file({"x": torch.zeros(2)}, aside)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_breaks_leaves_the_old_file_and_nothing_else(tmp_path, fault):
    path = write_text(tmp_path / "x", "old")
    with pytest.raises(fault), atomic_path(path) as aside:
        aside.write_text("half")
        raise fault
    assert path.read_text() == "old" and _names(tmp_path) == ["x"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])
def test_a_disk_that_fails_at_any_call_is_named(tmp_path, monkeypatch, call, number):
    path = write_text(tmp_path / "x", "old")

    def broken(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), broken)
    with pytest.raises(CannotWrite, match=str(path)) as caught:
        write_text(path, "new")
    assert caught.value.errno == number and "; " in str(caught.value)
    monkeypatch.undo()
    assert path.read_text() == "old" and _names(tmp_path) == ["x"]


class RustError(Exception):
    """As safetensors raises: the number of the system in words."""


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RustError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_inside_the_block_is_ours_whoever_writes(tmp_path, fault):
    with pytest.raises(CannotWrite, match="the disk is full; make room"), atomic_path(tmp_path / "x"):
        raise fault
    assert _names(tmp_path) == []


def test_other_faults_inside_the_block_stay_what_they_are(tmp_path):
    for fault in (FileNotFoundError(errno.ENOENT, "gone", "elsewhere"), ConnectionError("network")):
        with pytest.raises(type(fault)) as caught, atomic_path(tmp_path / "x"):
            raise fault
        assert not isinstance(caught.value, CannotWrite)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_really_full_device(tmp_path):
    with pytest.raises(CannotWrite, match="full"), atomic_path(tmp_path / "x") as aside:
        aside.unlink()
        aside.symlink_to("/dev/full")
        aside.write_bytes(b"x" * 100_000)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to the superuser")
def test_a_read_only_folder(tmp_path):
    folder = make_folder(tmp_path / "closed")
    folder.chmod(0o555)
    with pytest.raises(CannotWrite, match=r"permission denied; choose another folder"):
        write_text(folder / "x", "x")
    with pytest.raises(CannotWrite):
        make_folder(folder / "below")


def test_missing_folders_and_files_in_the_way(tmp_path):
    with pytest.raises(CannotWrite, match=r"none is not a folder; create it first"):
        write_text(tmp_path / "none" / "x", "x")
    file = write_text(tmp_path / "file", "x")
    for call in (
        lambda: make_folder(file),
        lambda: make_folder(file / "sub"),
        lambda: write_text(file / "x", ""),
    ):
        with pytest.raises(CannotWrite):
            call()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "y").touch()
    with pytest.raises(CannotWrite):
        write_text(tmp_path / "full", "x")
    assert _names(tmp_path) == ["file", "full"]


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path):
    path, contents = tmp_path / "x", [bytes([65 + i]) * 200_000 for i in range(8)]
    threads = [
        threading.Thread(target=lambda c=c: [write_bytes(path, c) for _ in range(5)]) for c in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents and _names(tmp_path) == ["x"]


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    seen: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (seen.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1]
    )
    monkeypatch.setattr(Path, "replace", lambda a, b: (seen.append(f"rename {b}"), replace(a, b))[1])
    write_atomic(tmp_path / "x", lambda file: file.write(b"x"))
    assert seen[0].endswith(".part") and seen[1:] == [f"rename {tmp_path / 'x'}", str(tmp_path)]


def test_long_names(tmp_path):
    assert write_text(tmp_path / ("x" * 255), "x").read_text() == "x"
    assert files.PARTS == ".*.part"


def test_saves_leave_the_old_file_or_the_new(tmp_path, monkeypatch):
    """Feature sets and reconstruction results: a disk that fails while the name is taken costs nothing that was there."""
    import mmhooks as mm
    from mmhooks.analysis.measures.modality_gap import modality_gap
    from mmhooks.heads import TopKSAE, reconstruction

    results = (
        mm.FeatureSet([1, 2], 8),
        reconstruction(TopKSAE(4, 8, 2), torch.randn(10, 4)),
        modality_gap(torch.randn(10, 4), torch.randn(10, 4)),
    )

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    for number, result in enumerate(results):
        path = tmp_path / f"{number}.json"
        path.write_text("old")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(CannotWrite, match="disk is full"):
                result.save(path)
        assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == number + 1
        assert result.save(path) == path and path.read_text().startswith("{")
