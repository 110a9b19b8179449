"""Makes hostile sources of pairs and reads them, in a process of its own: ``hostile_files.py FOLDER FIRST LAST``.

Prints a line of JSON a case: what came of it, and what was done that must not be (audit hooks see every process that
Python starts and every file that it opens).
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import signal
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SECRET = "SECRET-0f1e2d"
SECONDS = 120  # a case may take on a busy machine
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    b"(/tmp/mmhooks-was-here) (w) file closefile\nshowpage\n%%EOF\n"
)
KINDS: dict[str, Callable[..., Any]] = {}


def kind(make: Callable[..., Any]) -> Callable[..., Any]:
    """``make(rng, place)`` writes a source into the new folder ``place``, and returns what is read and how many rows
    it should have (None: that depends on the damage)."""
    KINDS[make.__name__] = make
    return make


def image(form: str = "PNG", size: int = 24) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, form)
    return buffer.getvalue()


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice([0, 1, 8, len(data) // 2, len(data) - 1, rng.randrange(len(data))])]


def changed(rng: random.Random, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        found[rng.randrange(len(found))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    return bytes(found)


def folder(place: Path, images: dict[str, bytes], rows: list[str] | None = None) -> tuple[Path, int]:
    for name, data in {"good.png": image(), **images}.items():
        (place / name).write_bytes(data)
    names = ["good.png", *(images if rows is None else rows)]
    lines = [f'"{name}","text {i}"' for i, name in enumerate(names)]
    (place / "metadata.csv").write_text("\n".join(["file_name,text", *lines]), encoding="utf-8")
    return place, len(names)


def tar_of(members: list[tuple[tarfile.TarInfo | str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for entry, data in members:
            if isinstance(entry, str):
                entry = tarfile.TarInfo(entry)
                entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def samples(n: int = 3, data: bytes | None = None) -> list[tuple[tarfile.TarInfo | str, bytes]]:
    return [m for i in range(n) for m in ((f"{i}.png", data or image()), (f"{i}.txt", b"text %d" % i))]


def parquet_of(path: Path, images: list[dict[str, Any]], **more: Any) -> tuple[Path, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table(
        {"image": pa.array(images, kind), "text": [f"text {i}" for i in range(len(images))], **more}
    )
    pq.write_table(table, path)
    return path, len(images)


# -- images --------------------------------------------------------------------------------------------------


@kind
def image_cut(rng: random.Random, place: Path) -> Any:
    return folder(place, {"bad.png": cut(rng, image(rng.choice(FORMATS)))})


@kind
def image_changed(rng: random.Random, place: Path) -> Any:
    return folder(place, {"bad.png": changed(rng, image(rng.choice(FORMATS)))})


@kind
def image_announces(rng: random.Random, place: Path) -> Any:
    """Headers that promise more pixels than there are."""
    big = rng.choice([30_000, 65_535, 2**31 - 1])
    whole = image("PNG")
    head = whole[8:16] + struct.pack(">II", big, big) + whole[24:29]
    png = whole[:8] + head + struct.pack(">I", zlib.crc32(head[4:])) + whole[33:]
    bmp, gif, tiff = bytearray(image("BMP")), bytearray(image("GIF")), bytearray(image("TIFF"))
    bmp[18:26] = struct.pack("<ii", big, rng.choice([big, -big]))
    gif[6:10] = gif[-10:-6] = b"\xff\xff\xff\xff"
    for at in range(len(tiff) - 12):
        if tiff[at : at + 4] in (
            struct.pack("<HH", 256, 3),
            struct.pack("<HH", 257, 3),
            struct.pack("<HH", 279, 4),
        ):
            tiff[at + 8 : at + 12] = struct.pack("<I", big)
    jpeg = bytearray(image("JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    ppm = b"P6 %d %d 255\n" % (big, big) + bytes(100)
    return folder(place, {"bad.png": bytes(rng.choice([png, bmp, gif, tiff, jpeg, ppm]))})


@kind
def image_bomb(rng: random.Random, place: Path) -> Any:
    """Small files that unpack to hundreds of megabytes."""
    side = rng.choice([9_500, 14_000, 30_000])
    buffer = io.BytesIO()
    if rng.random() < 0.5:
        Image.new("1", (side, side)).save(buffer, rng.choice(["PNG", "TIFF"]), **{})
        return folder(place, {"bad.png": buffer.getvalue()})
    name = rng.choice([b"zTXt", b"iCCP"])
    data = b"name\0\0" + zlib.compress(bytes(300_000_000), 9)
    whole = image()
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return folder(place, {"bad.png": whole[:33] + chunk + whole[33:]})


def eps(rng: random.Random) -> bytes:
    windows = b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 32, len(EPS), 0, 0, 0, 0) + b"\xff\xff\0\0" + EPS
    others = [b"8BPS\0\1" + bytes(60), b"DDS " + bytes(200), b"\xd7\xcd\xc6\x9a" + bytes(60), b"BLP2" + bytes(100),
              b"/* XPM */\n" + bytes(20), b"%PDF-1.4\n", b"GIMP" + bytes(40), b"<svg xmlns='x'/>"]  # fmt: skip
    return rng.choice([EPS, EPS, windows, *others])


@kind
def image_of_other_formats(rng: random.Random, place: Path) -> Any:
    data = eps(rng)
    source = rng.choice(["folder", "tar", "parquet", "zip"])
    if source == "folder":
        return folder(place, {f"bad.{rng.choice(['png', 'jpg', 'eps', 'webp', 'ps'])}": data})
    if source == "tar":
        (place / "s.tar").write_bytes(tar_of([*samples(1), ("9.png", data), ("9.txt", b"text 9")]))
        return place / "s.tar", 2
    if source == "parquet":
        return parquet_of(
            place / "x.parquet", [{"bytes": image(), "path": None}, {"bytes": data, "path": "x.eps"}]
        )
    return zipped(place, {"good.png": image(), "bad.png": data}), 2


# -- names ---------------------------------------------------------------------------------------------------


def outside(rng: random.Random, place: Path) -> str:
    secret = place.parent / "secret.png"
    (place / "link.png").symlink_to(secret)
    (place / "up").symlink_to(place.parent)
    return rng.choice(["../secret.png", f"{secret}", "link.png", "up/secret.png", "./x/../../secret.png",
                       f"file://{secret}", f"file:{secret}", f"local://{secret}", f"simplecache::file://{secret}",
                       f"zip://a.png::{secret}", "/proc/self/environ", "/etc/passwd", "~/.bashrc",
                       "https://localhost:9/x.png", "hf://datasets/a/b@main/x.png", "ftp://localhost/x",
                       f"{place}/../secret.png", "s3://b/x.png", "\\\\host\\share\\x.png", "a\0b"])  # fmt: skip


@kind
def name_outside(rng: random.Random, place: Path) -> Any:
    name = outside(rng, place)
    if rng.random() < 0.5 and "\0" not in name:
        return folder(place, {}, [name])
    return parquet_of(place / "x.parquet", [{"bytes": image(), "path": None}, {"bytes": None, "path": name}])


@kind
def file_special(rng: random.Random, place: Path) -> Any:
    bad = place / "bad.png"
    make = rng.choice(["pipe", "zero", "random", "folder", "loop", "sparse", "socket", "tty", "gone"])
    if make == "pipe":
        os.mkfifo(bad)
    elif make == "folder":
        bad.mkdir()
    elif make == "sparse":
        with bad.open("wb") as file:
            file.truncate(2**42)
    elif make == "socket":
        import socket

        socket.socket(socket.AF_UNIX).bind(os.path.relpath(bad))
    else:
        target = {
            "zero": "/dev/zero",
            "random": "/dev/urandom",
            "loop": bad,
            "tty": "/dev/tty",
            "gone": "nowhere",
        }
        bad.symlink_to(target[make])
    if rng.random() < 0.5:
        return folder(place, {}, ["bad.png"])
    return parquet_of(
        place / "x.parquet", [{"bytes": image(), "path": None}, {"bytes": None, "path": "bad.png"}]
    )


@kind
def source_special(rng: random.Random, place: Path) -> Any:
    """The table, the tar or the Parquet itself is a pipe, a device or a link to somewhere else."""
    (place / "good.png").write_bytes(image())
    name = rng.choice(["metadata.csv", "s.tar", "x.parquet", "x.arrow", "LICENSE"])
    bad = place / name
    if name == "LICENSE":
        folder(place, {})
    if rng.random() < 0.4:
        os.mkfifo(bad)
    else:
        bad.symlink_to(rng.choice(["/dev/zero", "/etc/passwd", str(place.parent / "secret.csv"), str(bad)]))
    return (place if name in ("metadata.csv", "LICENSE") else bad), None


# -- tables --------------------------------------------------------------------------------------------------


@kind
def table_changed(rng: random.Random, place: Path) -> Any:
    folder(place, {})
    rows = [f'good.png,"text {i}, with ""quotes""",i{i}' for i in range(6)]
    data = "\r\n".join(["file_name,text,id", *rows]).encode()
    extra = rng.choice([b'"', b",", b"\0", b"\r", b"\n", b"\xff", b'"' * 7, b"\xef\xbb\xbf", b"x" * 200_000])
    at = rng.randrange(len(data))
    data = rng.choice(
        [data[:at] + extra + data[at:], data[:at], data[:at] + data[at + 3 :], data.decode().encode("utf-16")]
    )
    (place / "metadata.csv").write_bytes(data)
    return place, None


@kind
def json_changed(rng: random.Random, place: Path) -> Any:
    (place / "good.png").write_bytes(image())
    name = outside(rng, place)
    line = {"file_name": "good.png", "text": "text"}
    rows = [json.dumps(line), json.dumps({**line, "file_name": name}),
            rng.choice(["[" * 100_000, '{"file_name": 1e999}', "{", "null", '"x"', "\0"])]  # fmt: skip
    (place / "metadata.jsonl").write_text("\n".join(rows), errors="replace")
    return place, None


# -- tars ----------------------------------------------------------------------------------------------------


@kind
def tar_cut(rng: random.Random, place: Path) -> Any:
    whole = tar_of(samples(4))
    with tarfile.open(fileobj=io.BytesIO(whole)) as file:
        starts = [at for member in file for at in (member.offset, member.offset_data)]
    at = rng.choice(starts) + rng.choice([-1, 0, 1, 100, 511, 512, 513])
    (place / "s.tar").write_bytes(whole[: max(0, at)])
    return place / "s.tar", 4


@kind
def tar_changed(rng: random.Random, place: Path) -> Any:
    whole = bytearray(tar_of(samples(4)))
    with tarfile.open(fileobj=io.BytesIO(bytes(whole))) as file:
        starts = [member.offset for member in file]
    at = rng.choice(starts) + rng.choice([0, 100, 124, 130, 148, 156, 257, 345, rng.randrange(512)])
    whole[at] ^= rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 255])
    (place / "s.tar").write_bytes(bytes(whole))
    return place / "s.tar", 4


@kind
def tar_hostile(rng: random.Random, place: Path) -> Any:
    """Headers with a right checksum that lie: sizes, links, devices, sparse files, records of PAX, names."""
    entry = tarfile.TarInfo(rng.choice(["7.png", "../7.png", "/tmp/7.png", "7.txt", "a/" * 200 + "7.png"]))
    form = tarfile.GNU_FORMAT
    lie = rng.choice(["size", "negative", "link", "device", "sparse", "pax", "name", "longlink"])
    if lie == "size":
        entry.size = rng.choice([2**20, 2**33, 2**62])
    elif lie == "negative":
        entry.size = -rng.choice([1, 512, 2**40])
    elif lie in ("link", "device"):
        entry.type = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE] if lie == "link" else
                                [tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"Z"])  # fmt: skip
        entry.linkname = rng.choice([str(place.parent / "secret.png"), "/dev/zero", "../secret.png", "7.png"])
    elif lie == "sparse":
        entry.type, entry.size = tarfile.GNUTYPE_SPARSE, 2**40
    elif lie == "pax":
        form = tarfile.PAX_FORMAT
        entry.pax_headers = rng.choice([{"size": "-5"}, {"size": "9" * 30}, {"path": "../../x.png"}, {"size": "x"},
                                        {"GNU.sparse.major": "1", "GNU.sparse.realsize": "9" * 15}])  # fmt: skip
    elif lie == "longlink":
        entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, rng.choice([2**30, 2**40])
    head = entry.tobuf(form, "utf-8", "surrogateescape")
    whole = tar_of(samples(2))
    end = 2 * len(image()) // 512 * 512
    with tarfile.open(fileobj=io.BytesIO(whole)) as file:
        end = file.getmembers()[2].offset
    data = whole[:end] + head + bytes(512) + whole[end:]
    if rng.random() < 0.2:
        data = rng.choice([gzip.compress(data), gzip.compress(bytes(10**8)), whole + whole])
    (place / "s.tar").write_bytes(data)
    return rng.choice([place / "s.tar", place]), None


@kind
def tar_with_code(rng: random.Random, place: Path) -> Any:
    """Pickles under every ending that some reader unpickles."""
    code = pickle.dumps(Evil())
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil()], dtype=object), allow_pickle=True)
    ends = ["pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "ten", "cbor", "mp", "py", "png"]
    members = samples(2)
    for end in ends:
        members.append((f"0x.{end}", buffer.getvalue() if end.startswith("np") else code))
    (place / "s.tar").write_bytes(tar_of([*members[:4], *members[4:]]))
    for name in ("set.py", "data.py", f"{place.name}.py"):
        (place / name).write_text("import os; os.system('touch /tmp/mmhooks-was-here')")
    return rng.choice([place / "s.tar", place]), None


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/mmhooks-was-here",)


# -- Parquet, Arrow, zip, the data set's card ----------------------------------------------------------------


@kind
def parquet_damaged(rng: random.Random, place: Path) -> Any:
    path, n = parquet_of(place / "x.parquet", [{"bytes": image(), "path": None}] * 5)
    path.write_bytes(rng.choice([cut, changed])(rng, path.read_bytes()))
    return path, None


@kind
def arrow_damaged(rng: random.Random, place: Path) -> Any:
    import datasets

    rows = {"image": [{"bytes": image(), "path": None}] * 5, "text": [f"text {i}" for i in range(5)]}
    found = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    found.save_to_disk(place)
    state, data = place / "state.json", place / "data-00000-of-00001.arrow"
    what = rng.choice(["arrow", "arrow", "state", "names", "info", "one file"])
    if what == "arrow":
        data.write_bytes(rng.choice([cut, changed])(rng, data.read_bytes()))
    elif what == "names":
        about = json.loads(state.read_text())
        about["_data_files"] = [
            {"filename": rng.choice(["../secret.csv", "/etc/passwd", "/dev/zero", "nowhere"])}
        ]
        state.write_text(json.dumps(about))
    elif what == "one file":
        one = place / "one.arrow"
        one.write_bytes(changed(rng, data.read_bytes()))
        return one, None
    else:
        path = state if what == "state" else place / "dataset_info.json"
        path.write_bytes(rng.choice([cut, changed])(rng, path.read_bytes()))
    return place, None


def zipped(place: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(place / "train.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in files.items():
            file.writestr(name, data)
        lines = [f'"{name}",text' for name in files]
        file.writestr("metadata.csv", "\n".join(["file_name,text", *lines]))
    return place


@kind
def zip_hostile(rng: random.Random, place: Path) -> Any:
    what = rng.choice(["damaged", "damaged", "deep", "bomb", "names"])
    if what == "names":
        return zipped(
            place, {"good.png": image(), "../secret.png": image(), f"{place.parent}/secret.png": image()}
        ), None
    if what == "bomb":
        return zipped(place, {"good.png": image(), "bad.png": bytes(600_000_000)}), None
    zipped(place, {"good.png": image(), "bad.png": image()})
    path = place / "train.zip"
    data = path.read_bytes()
    if what == "deep":
        for _ in range(30):
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as file:
                file.writestr("train.zip", data)
            data = buffer.getvalue()
        path.write_bytes(data)
    else:
        path.write_bytes(rng.choice([cut, changed])(rng, data))
    return place, None


@kind
def card_hostile(rng: random.Random, place: Path) -> Any:
    (place / "good.png").write_bytes(image())
    (place / "metadata.jsonl").write_text('{"file_name": "good.png", "text": "text 0"}\n')
    secret = place.parent / "secret.csv"
    config = "configs:\n- config_name: default\n  data_files: "
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 24))
    body = rng.choice([config + f"{secret}", config + '"../*.csv"', config + "/etc/passwd", config + f'"{place}/../*"',
                       config + f"zip://x::{secret}", config + f"file://{secret}", laughs, "a: [", "\0",
                       "x: !!python/object/apply:os.system ['touch /tmp/mmhooks-was-here']"])  # fmt: skip
    (place / "README.md").write_text(f"---\n{body}\n---\n")
    return place, None


@kind
def kept_copy_damaged(rng: random.Random, place: Path) -> Any:
    import mmhooks as mm

    source, _ = parquet_of(place / "x.parquet", [{"bytes": image(), "path": None}] * 5)
    mm.data.pairs(source, progress=False)
    for stored in Path(os.environ["MMHOOKS_CACHE"], "pairs").glob(f"*{place.name}*"):
        stored.write_bytes(rng.choice([cut, changed])(rng, stored.read_bytes()))
    return source, None


# -- reading -------------------------------------------------------------------------------------------------


class Late(BaseException):
    """The time is over; no handler of ours or of a library may take it for an error of reading."""


class Watch:
    """What Python did while a case ran."""

    _STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn",
               "pickle.find_class", "os.startfile")  # fmt: skip

    def __init__(self, secrets: set[str]) -> None:
        self.on, self.done, self._secrets = False, [], secrets
        sys.addaudithook(self._see)

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in self._STARTS:
            self.done.append(f"{event} {args[:1]!r}")
        elif event == "open" and isinstance(args[0], (str, bytes)):
            name = os.fsdecode(args[0])
            if os.path.realpath(name) in self._secrets or name.startswith(
                ("/dev/zero", "/dev/urandom", "/etc/passwd")
            ):
                self.done.append(f"open {name}")


def outcome(read: Callable[[], tuple[int, int, str]], watch: Watch) -> dict[str, Any]:
    from mmhooks.errors import DataError

    began, watch.done, watch.on = time.monotonic(), [], True
    signal.alarm(SECONDS)
    try:
        rows, skipped, said = read()
        found = {"end": "read", "rows": rows, "skipped": skipped, "leak": SECRET in said}
    except DataError as fault:
        found = {"end": "DataError", "said": str(fault)[:300], "leak": SECRET in str(fault)}
    except Late:
        found = {"end": "hang"}
    except BaseException as fault:
        found = {"end": f"foreign {type(fault).__module__}.{type(fault).__name__}", "said": str(fault)[:300]}
    finally:
        signal.alarm(0)
        watch.on = False
    return {**found, "done": watch.done, "seconds": round(time.monotonic() - began, 2)}


def main(top: Path, first: int, last: int) -> None:
    import mmhooks as mm

    os.environ["MMHOOKS_CACHE"], os.environ["HF_DATASETS_CACHE"] = str(top / "cache"), str(top / "hf")

    def late(*_: Any) -> None:
        raise Late

    signal.signal(signal.SIGALRM, late)
    secret = image(size=33)
    watch = Watch({str(top / "secret.png"), str(top / "secret.csv"), os.path.realpath("/etc/passwd")})
    (top / "secret.png").write_bytes(secret)
    (top / "secret.csv").write_text(f"file_name,text\n{top}/secret.png,{SECRET}\n")

    def pairs(source: Path, on_error: str) -> tuple[int, int, str]:
        found = mm.data.pairs(source, on_error=on_error, progress=False)  # type: ignore[arg-type]
        sizes = {image.size for image in found.images()}
        return len(found), len(found.skipped), str(found.texts) + SECRET * ((33, 33) in sizes)

    def stream(source: Path, on_error: str) -> tuple[int, int, str]:
        read = mm.data.pair_stream(source, on_error=on_error)
        found = [(pair.text, pair.image.size) for pair in read]
        return len(found), len(read.skipped), str(found) + SECRET * ((33, 33) in {size for _, size in found})

    for make in (image_cut, tar_cut, arrow_damaged, zip_hostile):  # imports look for libraries, by programs
        place = top / f"first-{make.__name__}"
        place.mkdir()
        source, _ = make(random.Random(0), place)
        outcome(lambda s=source: stream(s, "skip"), watch)  # type: ignore[misc]
    names = list(KINDS)
    for number in range(first, last):
        name, rng = names[number % len(names)], random.Random(number)
        place = top / f"case{number}"
        place.mkdir()
        os.chdir(place)
        print(json.dumps({"case": number, "kind": name}), flush=True)  # the last one, if the process dies
        source, rows = KINDS[name](rng, place)
        table = (place / "metadata.csv").exists() or (place / "metadata.csv").is_symlink()
        ways = [(pairs, "raise"), (pairs, "skip")] + ([] if table else [(stream, "raise"), (stream, "skip")])
        for read, on_error in ways:
            found = outcome(lambda r=read, s=source, e=on_error: r(s, e), watch)  # type: ignore[misc]
            about = {"case": number, "kind": name, "way": f"{read.__name__} {on_error}", "expected": rows}
            print(json.dumps({**about, **found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3]))
