"""The one way in which mmhooks opens an image file: upright, 8 bits a channel, RGB or RGBA, or a DataError.

Pillow tries some forty formats by what a file contains, whatever its name says. One of them (EPS) starts another
program, many are seldom tried by anybody, and several decode to numbers that a conversion to RGB then clips: white,
black, or lying on its side. So the formats are named here, and nothing else is opened.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from jaxtyping import Bool
from PIL import Image

from mmhooks.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF


def open_image(data: bytes) -> Image.Image:
    """Decodes the bytes of an image file, upright and with 8 bits a channel: RGB, or RGBA where it has transparency.

    EXIF orientation is applied (a block that cannot be read counts as none, as in browsers). 16-bit greys are scaled,
    not clipped. CMYK becomes RGB by Pillow's formula, without colour profiles. Of an animation or a file of several
    pages it is the first frame.

    Args:
        data: of a file in one of :data:`FORMATS`.

    Raises:
        DataError: another format; damaged or truncated data; more pixels than ``PIL.Image.MAX_IMAGE_PIXELS`` (89
            million unless you set it); floating-point or 32-bit samples, whose range no format defines.

    >>> buffer = io.BytesIO(); Image.new("I;16", (4, 2), 0x8000).save(buffer, "PNG")
    >>> open_image(buffer.getvalue()).getpixel((0, 0))
    (128, 128, 128)
    """
    try:
        return _in_8_bits(_upright(_decoded(data, whole=True)))
    except DataError:
        raise
    except Exception as fault:  # each decoder has errors of its own
        raise DataError(_said(fault)) from fault


def image_fault(data: bytes) -> str | None:
    """Says why :func:`open_image` would refuse these bytes; None where it would not.

    Cheaper than opening: JPEG is decoded at an eighth of its size, which shows truncated data all the same.

    >>> image_fault(b"%!PS-Adobe-3.0 EPSF-3.0")[:69]
    "cannot identify image file (23 bytes, they begin with b'%!PS-Adobe-3."
    """
    try:
        _in_8_bits(_upright(_decoded(data, whole=False)))
    except Exception as fault:
        return _said(fault)
    return None


def open_mask(data: bytes) -> Bool[np.ndarray, "h w"]:
    """Decodes the bytes of a mask: where it is not black, whatever its samples are; upright like :func:`open_image`.

    Raises:
        DataError: another format, or damaged data.

    >>> buffer = io.BytesIO(); Image.fromarray(np.eye(2, dtype=np.uint16)).save(buffer, "PNG")  # 1 of 65,535
    >>> open_mask(buffer.getvalue()).tolist()
    [[True, False], [False, True]]
    """
    try:
        mask = _upright(_decoded(data, whole=True))
        return np.asarray(mask if mask.mode[0] in "IF" else mask.convert("L")) > 0
    except DataError:
        raise
    except Exception as fault:  # each decoder has errors of its own
        raise DataError(_said(fault)) from fault


def rgb(image: Image.Image) -> Image.Image:
    """In RGB, laid on white where it is transparent."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.convert("RGB")


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Those of :data:`FORMATS` that this installation of Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _decoded(data: bytes, *, whole: bool) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=formats())
    except Image.UnidentifiedImageError as fault:
        raise DataError(
            f"cannot identify image file ({len(data)} bytes, they begin with {bytes(data[:16])!r}); expected one of "
            f"{', '.join(formats())}"
        ) from fault
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise DataError(
            f"{image.width} x {image.height} pixels, expected at most {most:,}; set PIL.Image.MAX_IMAGE_PIXELS if you "
            "mean it"
        )
    if not whole:
        image.draft("RGB", (1, 1))
    image.load()
    return image


def _upright(image: Image.Image) -> Image.Image:
    # Pillow's exif_transpose also writes the block anew, and fails where some other tag in it is odd. TIFF and AVIF
    # turn while they load, and then no longer state an orientation.
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # no block that could be read: stored as it is to be seen
        return image
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info, turned.format = image.info, image.format
    return turned


def _check_samples(image: Image.Image) -> None:
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise DataError(
            f"{image.format} with {kind} samples, expected 8 or 16 bits without sign: what is black and what is white "
            "is not stated in it; scale it to 0 ... 255 and save it with 8 bits"
        )
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:  # Pillow compares the wrong byte of it
        raise DataError("16-bit colours of which one is transparent; save it with an alpha channel or 8 bits")
    if image.mode == "LAB":
        raise DataError(f"{image.format} in CIELAB, expected grey, RGB or CMYK; convert it to RGB")


def _in_8_bits(image: Image.Image) -> Image.Image:
    _check_samples(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(image)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode and "transparency" not in image.info else image.convert(mode)


def _from_16_bits(image: Image.Image) -> Image.Image:
    tags = getattr(image, "tag_v2", {})
    most = 2 ** int(tags.get(_BITS_PER_SAMPLE, (16,))[0]) - 1
    values = np.asarray(image).astype(np.uint32)
    grey = (values * 255 + most // 2) // most
    if tags.get(_PHOTOMETRIC, 1) == _WHITE_IS_ZERO:  # Pillow turns these round for 8 bits only
        grey = 255 - grey
    shown = Image.fromarray(grey.astype(np.uint8), "L")
    clear = image.info.get("transparency")
    if clear is None:
        return shown.convert("RGB")
    shown.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8), "L"))
    return shown.convert("RGBA")


def _said(fault: Exception) -> str:
    """The first line of what a decoder said, and its class where it said nothing."""
    first = (str(fault).strip().splitlines() or [""])[0][:200]
    return (
        first if isinstance(fault, DataError) or len(first) > 3 else f"{type(fault).__name__} {first}".strip()
    )
