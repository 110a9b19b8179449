"""The one opener of images: every format, depth, mode and orientation, and what it refuses."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmhooks.errors import DataError

ROOT = Path(__file__).parents[2]
# Colours of the upright image's four corners; stored[o] turned as EXIF orientation o says gives it.
CORNERS = np.zeros((24, 40, 3), np.uint8)
CORNERS[:12, :20], CORNERS[12:, :20], CORNERS[:12, 20:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
STORED = {
    1: CORNERS, 2: CORNERS[:, ::-1], 3: CORNERS[::-1, ::-1], 4: CORNERS[::-1],
    5: CORNERS.swapaxes(0, 1), 6: np.rot90(CORNERS), 7: np.rot90(CORNERS, 2).swapaxes(0, 1), 8: np.rot90(CORNERS, 3),
}  # fmt: skip


def opened(data):
    from mmhooks.data.sources.images import image_fault, open_image

    assert image_fault(data) is None
    image = open_image(data)
    assert image.mode in ("RGB", "RGBA")
    return np.asarray(image)


def refused(data):
    """Why it is refused; by the check and by the opener alike."""
    from mmhooks.data.sources.images import image_fault, open_image

    with pytest.raises(DataError) as caught:
        open_image(data)
    assert image_fault(data) == str(caught.value)
    return str(caught.value)


def saved(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def tiff(values, *, white_is_zero=False, bits=None, kind=1):
    """A TIFF of one channel without compression, in the byte order and depth of ``values``."""
    order, data = ("MM", ">") if values.dtype.byteorder == ">" else ("II", "<"), values.tobytes()
    (mark, e), (h, w) = order, values.shape
    bits = bits or values.dtype.itemsize * 8
    w = w * values.dtype.itemsize * 8 // bits
    tags = [
        (256, w),
        (257, h),
        (258, bits),
        (259, 1),
        (262, 0 if white_is_zero else 1),
        (273, 8),
        (277, 1),
        (278, h),
    ]
    entries = [struct.pack(f"{e}HHIHH", tag, 3, 1, value, 0) for tag, value in tags]
    entries += [struct.pack(f"{e}HHII", 279, 4, 1, len(data)), struct.pack(f"{e}HHIHH", 339, 3, 1, kind, 0)]
    head = mark.encode() + struct.pack(f"{e}HI", 42, 8 + len(data))
    return head + data + struct.pack(f"{e}H", len(entries)) + b"".join(entries) + bytes(4)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(values, colour, *extra):
    """A PNG of 16 bits."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    body = b"".join([*extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("form", "options"),
    [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True}), ("AVIF", {"quality": 95}),
     ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)  # fmt: skip
def test_every_orientation_is_applied(form, options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(STORED[orientation])), form, exif=exif, **options)
    got = opened(data).astype(int)
    assert got.shape == CORNERS.shape and np.abs(got - CORNERS).mean() < 6


@pytest.mark.parametrize("block", [b"Exif\0\0no tiff", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_an_exif_block_that_cannot_be_read_counts_as_none(block):
    assert (
        np.abs(
            opened(saved(Image.fromarray(CORNERS), "JPEG", quality=95, exif=block)).astype(int) - CORNERS
        ).mean()
        < 6
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 65535), min_size=6, max_size=6), st.sampled_from(range(8)))
def test_sixteen_bits_are_scaled(values, kind):
    grey = np.array(values, np.uint16).reshape(2, 3)
    wanted = np.round(grey / 257)
    data = [
        lambda: png(grey, 0),
        lambda: png(np.repeat(grey[..., None], 3, -1), 2),
        lambda: png(np.concatenate([np.repeat(grey[..., None], 3, -1), grey[..., None]], -1), 6),
        lambda: saved(Image.fromarray(grey), "TIFF", compression="tiff_lzw"),
        lambda: tiff(grey.astype(">u2")),
        lambda: tiff(grey.astype("<u2")),
        lambda: tiff((65535 - grey).astype("<u2"), white_is_zero=True),
        lambda: b"P5 3 2 65535\n" + grey.astype(">u2").tobytes(),
    ][kind]()
    got = opened(data)
    assert np.abs(got[..., 0] - wanted).max() <= 1 and np.abs(got[..., 2] - wanted).max() <= 1
    if got.shape[2] == 4:
        assert np.abs(got[..., 3] - wanted).max() <= 1


@pytest.mark.parametrize("most", [1, 7, 255, 256, 1023, 4095, 65535])
def test_a_pgm_of_any_depth_spans_black_to_white(most):
    values = np.linspace(0, most, 8).round().astype(">u2" if most > 255 else "u1")
    got = opened(b"P5 4 2 %d\n" % most + values.tobytes())[..., 0].ravel()
    assert np.abs(got - values / most * 255).max() <= 1


def test_twelve_bits_in_a_tiff_span_black_to_white():
    values = np.linspace(0, 4095, 16).astype(int)
    packed = bytearray()
    for a, b in zip(values[::2], values[1::2], strict=True):
        packed += bytes([a >> 4, ((a & 15) << 4) | (b >> 8), b & 255])
    got = opened(tiff(np.frombuffer(bytes(packed), np.uint8).reshape(4, 6), bits=12))[..., 0].ravel()
    assert np.abs(got - values / 4095 * 255).max() <= 1


def test_transparency_of_sixteen_bits():
    grey = np.array([[0, 1000, 1001]], np.uint16)
    got = opened(png(grey, 0, chunk(b"tRNS", struct.pack(">H", 1000))))
    assert got[0, :, 3].tolist() == [255, 0, 255]
    colours = np.repeat(grey[..., None], 3, -1)
    said = refused(png(colours, 2, chunk(b"tRNS", struct.pack(">HHH", 1000, 1000, 1000))))
    assert "16-bit colours with a transparent colour" in said


@pytest.mark.parametrize(
    ("data", "what"),
    [(tiff(np.full((2, 2), 0.5, "<f4"), kind=3), "floating-point"), (tiff(np.ones((2, 2), "<u4")), "32-bit"),
     (tiff(np.ones((2, 2), "<i2"), kind=2), "signed"), (saved(Image.new("LAB", (2, 2)), "TIFF"), "CIELAB"),
     (b"Pf 2 2 -1.0\n" + np.ones(4, "<f4").tobytes(), "floating-point")],
)  # fmt: skip
def test_samples_without_a_stated_range_are_refused(data, what):
    assert what in refused(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_of_every_format_keeps_its_colour(form, mode):
    """Grey 60, half transparent where the mode and format keep that."""
    image = Image.new("RGBA", (16, 16), (60, 60, 60, 128)).convert(mode)
    if mode == "1":
        image = Image.new("1", (16, 16), 1)
    try:
        data = saved(image, form)
    except (OSError, KeyError, ValueError):
        pytest.skip(f"Pillow writes no {mode} as {form}")
    got = opened(data).astype(int)
    assert np.abs(got[4:12, 4:12, :3] - (255 if mode == "1" else 60)).max() <= 3
    if mode in ("LA", "RGBA") and form in ("PNG", "WEBP", "TIFF", "AVIF", "JPEG2000"):
        assert np.abs(got[..., 3] - 128).max() <= 2


def test_palettes_with_transparency_and_the_first_frame_of_an_animation():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    assert opened(saved(image, "PNG", transparency=1))[0, 0].tolist() == [200, 10, 10, 0]
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        data = saved(frames[0], form, save_all=True, append_images=frames[1:])
        assert np.abs(opened(data)[0, 0].astype(int)[:3] - (255, 0, 0)).max() <= 8


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("form", ["EPS", "DDS", "TGA", "PCX", "ICO", "SGI", "XBM", "IM", "PSD", "BLP"])
def test_other_formats_are_refused_by_name(form, monkeypatch):
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(subprocess, "check_call", None)
    data = {"EPS": EPS, "PSD": b"8BPS\0\x01" + bytes(40), "BLP": b"BLP2" + bytes(200)}.get(form)
    said = refused(
        data or saved(Image.new("L" if form == "SGI" else "1" if form == "XBM" else "RGB", (32, 32)), form)
    )
    assert said.startswith("cannot identify image file") and "expected one of JPEG, PNG" in said


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    bomb = saved(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 100_000 and "exceeds limit" in refused(bomb)
    with pytest.warns(Image.DecompressionBombWarning):
        assert "expected at most 89,478,485" in refused(saved(Image.new("1", (10_000, 9_000)), "PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "expected at most 100 pixels, got 11 x 10" in refused(saved(Image.new("L", (11, 10)), "PNG"))
    assert opened(saved(Image.new("L", (10, 10)), "PNG")).shape == (10, 10, 3)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_truncated_and_changed_files_are_refused_or_whole(data):
    """Cut anywhere: refused, or the same pixels. Bytes changed: an image or a DataError, never another error."""
    from mmhooks.data.sources.images import image_fault, open_image

    form = data.draw(
        st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
    )
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(noise), form)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    if image_fault(cut) is None:
        assert (np.asarray(open_image(cut)) == np.asarray(open_image(whole))).all()
    changed = bytearray(whole)
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=6)):
        changed[at] = data.draw(st.integers(0, 255))
    try:
        open_image(bytes(changed))
    except DataError:
        pass


def test_masks_keep_every_value_but_black():
    from mmhooks.data.sources.images import open_mask

    values = np.array([[0, 1, 300]], np.uint16)
    for mask in (values, np.minimum(values, 255).astype(np.uint8)):
        assert open_mask(saved(Image.fromarray(mask), "PNG")).tolist() == [[False, True, True]]
    with pytest.raises(DataError, match="cannot identify"):
        open_mask(EPS)


def test_nothing_else_opens_image_files():
    """Every other way to Pillow's decoders would be one without the list of formats."""
    found = [
        str(path.relative_to(ROOT))
        for folder in ("mmhooks", "recipes", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if re.search(
            r"\b(Image|Pictures|PIL)\.open\(|\bimread\(|default_loader", path.read_text(encoding="utf-8")
        )
    ]
    assert found == ["mmhooks/data/sources/images.py"]
    assert (ROOT / "mmhooks/data/sources/images.py").read_text().count("formats=formats()") == 1
