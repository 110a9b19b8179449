"""Local files that were swapped between two runs: a store of the old ones is not gone on with, kept pairs are not used."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest

import mmhooks as mm
from data.tiny import encoded, text, tiny_clip
from mmhooks.data.sources import hub as stream
from mmhooks.errors import StoreError

OPTIONS = {"sites": ["image.embed"], "batch_size": 4, "shard_rows": 8, "progress": False}
N = 20


def tar_of(path: Path, first: int = 0, padding: int = 0) -> Path:
    """Samples ``first`` to ``first + N``; ``padding`` bytes more in each."""
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + N):
            for ending, data in (
                ("png", encoded(i).ljust(200, b"\0")),
                ("txt", text(i).ljust(40).encode()),
                ("bin", bytes(padding)),
            ):
                info = tarfile.TarInfo(f"{i - first:04d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def table_of(path: Path, first: int = 0) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"image": {"bytes": encoded(i).ljust(200, b"\0"), "path": None}, "text": text(i).ljust(40)}
        for i in range(first, first + N)
    ]
    pq.write_table(
        pa.Table.from_pylist(rows), path, compression="none", use_dictionary=False, write_statistics=False
    )
    return path


def swap(place: Path, other: Path) -> None:
    """Other bytes under the same name, size and time."""
    before = place.stat()
    content = other.read_bytes()
    assert len(content) == before.st_size
    place.write_bytes(content)
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (place.stat().st_size, place.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.fixture(scope="module")
def model():
    return tiny_clip()


@pytest.mark.parametrize("form", ["file", "glob", "folder", "table"])
def test_a_swapped_file_is_refused_at_resume(model, tmp_path, form):
    (tmp_path / "data").mkdir()
    make, ending = (table_of, "parquet") if form == "table" else (tar_of, "tar")
    place = make(tmp_path / "data" / f"a.{ending}")
    source = {
        "file": place,
        "table": place,
        "glob": str(tmp_path / "data" / "*.tar"),
        "folder": tmp_path / "data",
    }[form]
    mm.extract(model, mm.data.pair_stream(source), out=tmp_path / "acts", **OPTIONS)
    again = mm.extract(model, mm.data.pair_stream(source), out=tmp_path / "acts", **OPTIONS)
    assert len(again) == N
    swap(place, make(tmp_path / f"other.{ending}", first=5))
    before = {p.name: p.read_bytes() for p in (tmp_path / "acts").iterdir() if p.is_file()}
    with pytest.raises(StoreError, match=r"other settings: .*data\.fingerprint"):
        mm.extract(model, mm.data.pair_stream(source), out=tmp_path / "acts", **OPTIONS)
    assert {p.name: p.read_bytes() for p in (tmp_path / "acts").iterdir() if p.is_file()} == before


def test_a_run_that_was_cut_off_goes_on_only_with_the_same_tar(model, tmp_path):
    place = tar_of(tmp_path / "a.tar")
    encode, seen = type(model).forward, []

    def breaks(self, images=None, texts=None):
        seen.append(len(images))
        if len(seen) > 4:
            raise KeyboardInterrupt
        return encode(self, images, texts)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(model), "forward", breaks)
        mm.extract(model, mm.data.pair_stream(place), out=tmp_path / "acts", **OPTIONS)
    kept = shutil.copytree(tmp_path / "acts", tmp_path / "kept")
    swap(place, tar_of(tmp_path / "b.tar", first=3))
    with pytest.raises(StoreError, match=r"data\.fingerprint"):
        mm.extract(model, mm.data.pair_stream(place), out=tmp_path / "acts", **OPTIONS)
    swap(place, tar_of(tmp_path / "c.tar"))
    assert len(mm.extract(model, mm.data.pair_stream(place), out=kept, **OPTIONS)) == N


def test_pairs_that_were_kept_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MMHOOKS_CACHE", str(tmp_path / "cache"))
    place = tar_of(tmp_path / "a.tar")
    first = mm.data.pairs(place, progress=False)
    swap(place, tar_of(tmp_path / "b.tar", first=3))
    assert (
        mm.data.pairs(place, progress=False).texts
        == [t.strip() for t in map(text, range(3, 3 + N))]
        != first.texts
    )


@pytest.mark.parametrize("at", [0, 700, 2**20 - 1, -1, -(2**20)])
def test_every_byte_at_the_edges_counts(tmp_path, at):
    place = tmp_path / "a.tar"
    place.write_bytes(bytes(5 * 2**20))
    before = stream.file_state(place)
    other = bytearray(5 * 2**20)
    other[at] = 1
    (tmp_path / "other").write_bytes(other)
    swap(place, tmp_path / "other")
    assert stream.file_state(place) != before


def test_a_small_file_is_read_once_and_an_image_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(b"x" * 100)
    (tmp_path / "b.PNG").write_bytes(b"y" * 100)
    opened, real = [], Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: opened.append(self.name) or real(self, *a, **k))
    state = stream.file_state(tmp_path)
    assert opened == ["a.tar"] and [row[3] == "" for row in state] == [False, True]
