"""Opens image files, for all of mmhooks: upright, 8 bits per channel, RGB or RGBA, or a DataError.

Pillow tries some forty formats according to a file's content, regardless of its name. One of them (EPS) starts another
program, many are rarely tested, and several decode to values that a conversion to RGB clips, or to rotated images. So
the supported formats are listed here, and nothing else is opened.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from jaxtyping import Bool
from PIL import Image

from mmhooks.errors import DataError
from mmhooks.utils.faults import first_line

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
    """Decodes the bytes of an image file, upright and with 8 bits per channel: RGB, or RGBA if it has transparency.

    EXIF orientation is applied (an unreadable EXIF block is ignored, as in browsers). 16-bit greys are scaled, not
    clipped. CMYK becomes RGB by Pillow's formula, without colour profiles. Of animations and multi-page files, the
    first frame is returned.

    Args:
        data: content of a file in one of :data:`FORMATS`.

    Raises:
        DataError: another format; damaged or truncated data; more pixels than ``PIL.Image.MAX_IMAGE_PIXELS`` (89
            million by default); floating-point or 32-bit samples, whose range no format defines.

    >>> buffer = io.BytesIO(); Image.new("I;16", (4, 2), 0x8000).save(buffer, "PNG")
    >>> open_image(buffer.getvalue()).getpixel((0, 0))
    (128, 128, 128)
    """
    try:
        return _in_8_bits(_upright(_decoded(data, whole=True)))
    except DataError:
        raise
    except Exception as fault:  # each decoder raises its own errors
        raise DataError(_message(fault)) from fault


def image_fault(data: bytes) -> str | None:
    """Why :func:`open_image` would refuse these bytes; None if it would not.

    Cheaper than opening: JPEG is decoded at an eighth of its size, which still detects truncated data.

    >>> image_fault(b"%!PS-Adobe-3.0 EPSF-3.0")[:69]
    "cannot identify image file (23 bytes, beginning with b'%!PS-Adobe-3.0"
    """
    try:
        _in_8_bits(_upright(_decoded(data, whole=False)))
    except Exception as fault:
        return _message(fault)
    return None


def open_mask(data: bytes) -> Bool[np.ndarray, "h w"]:
    """Decodes a mask file: True where a pixel is not black, for samples of any type; upright like :func:`open_image`.

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
    except Exception as fault:  # each decoder raises its own errors
        raise DataError(_message(fault)) from fault


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, on white where it is transparent."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.convert("RGB")


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """The :data:`FORMATS` that this installation of Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _decoded(data: bytes, *, whole: bool) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=formats())
    except Image.UnidentifiedImageError as fault:
        raise DataError(
            f"cannot identify image file ({len(data)} bytes, beginning with {bytes(data[:16])!r}); expected one of "
            f"{', '.join(formats())}"
        ) from fault
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise DataError(
            f"expected at most {most:,} pixels, got {image.width} x {image.height}; raise PIL.Image.MAX_IMAGE_PIXELS if "
            "you trust the file"
        )
    if not whole:
        image.draft("RGB", (1, 1))
    image.load()
    return image


def _upright(image: Image.Image) -> Image.Image:
    # Pillow's exif_transpose also rewrites the EXIF block, and fails if another tag in it is invalid. TIFF and AVIF
    # are rotated while loading, and then have no orientation tag.
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # an unreadable EXIF block is ignored
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
            f"{image.format}: expected unsigned samples of 8 or 16 bits, got {kind} ones, whose black and white levels "
            "are undefined; scale them to 0 ... 255 and save the image with 8 bits"
        )
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:  # Pillow compares the wrong byte of it
        raise DataError(
            "16-bit colours with a transparent colour are not supported; save it with an alpha channel or 8 bits"
        )
    if image.mode == "LAB":
        raise DataError(f"{image.format}: expected grey, RGB or CMYK, got CIELAB; convert it to RGB")


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
    if tags.get(_PHOTOMETRIC, 1) == _WHITE_IS_ZERO:  # Pillow inverts these only for 8 bits
        grey = 255 - grey
    shown = Image.fromarray(grey.astype(np.uint8), "L")
    clear = image.info.get("transparency")
    if clear is None:
        return shown.convert("RGB")
    shown.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8), "L"))
    return shown.convert("RGBA")


def _message(fault: Exception) -> str:
    """The first line of a decoder's message, after its class name if it is very short (zlib's are numbers)."""
    said = first_line(fault)
    return said if isinstance(fault, DataError) or len(said) > 3 else f"{type(fault).__name__} {said}"
