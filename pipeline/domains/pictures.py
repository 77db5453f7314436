"""Picture files from strangers: bounded before decoding, and one stored form after it.

The serving side decodes with the same function, so a model sees what it was trained on.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.errors import DataError
from pipeline.domains.base import Pixels

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_FORMATS = ("PNG", "JPEG")
_PNG_HEAD = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
"""What every PNG begins with; its width and height follow."""
_PNG_FIRST_CHUNK, _PNG_DEPTH_BYTE = 8, 24
_EXIF_ORIENTATION = 274


@dataclass(frozen=True)
class Limits:
    """What is refused unread."""

    max_bytes: int = 10_000_000
    max_pixels: int = 4_000_000
    max_side: int = 4096


class PictureRefused(DataError):  # noqa: N818 - it reads as what happened
    """A file that is no usable picture; `reason` is short and the same for every such file."""

    def __init__(self, reason: str, mend: str) -> None:
        super().__init__(f"the picture was refused: {reason}. {mend}")
        self.reason = reason


@dataclass(frozen=True)
class Decoded:
    """A picture in the stored form."""

    pixels: Pixels
    """uint8 [C, H, W]."""
    conversions: tuple[str, ...]
    """What had to be changed beside its size, e.g. "CMYK to RGB"."""


def decode_picture(
    content: bytes, *, size: int, channels: int, limits: Limits | None = None
) -> Decoded:
    """Decode a PNG or JPEG to `channels` (1 or 3) x `size` x `size`.

    Size, format and number of frames are judged by the header, before any pixel is decoded. The
    whole picture is stretched to the square; transparency is laid over white; of 16-bit values
    the upper 8 bits are kept.

    Raises:
        PictureRefused: it is too big, damaged, animated, or neither PNG nor JPEG.
    """
    limits = limits or Limits()
    _check_size(content, limits)
    try:
        return _decode(content, size, channels, limits)
    except PictureRefused:
        raise
    except MemoryError:
        raise PictureRefused(
            "decoding it takes too much memory", "Save it as a smaller PNG or JPEG."
        ) from None
    except Exception:  # Pillow's decoders raise nearly every type on damaged input
        raise PictureRefused("damaged or cut short", "Save it again as PNG or JPEG.") from None


def num_pixels(content: bytes) -> int:
    """Of a PNG or JPEG by its header, which nothing vouches for; 0 for what has none."""
    if content.startswith(_PNG_HEAD) and len(content) >= _PNG_DEPTH_BYTE:
        width, height = struct.unpack_from(">II", content, len(_PNG_HEAD))
        return int(width * height)
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as picture:
            return picture.width * picture.height
    except Exception:  # `decode_picture` says what is wrong
        return 0


def _check_size(content: bytes, limits: Limits) -> None:
    if not content:
        raise PictureRefused("the file is empty", "Replace or remove it.")
    if len(content) > limits.max_bytes:
        raise PictureRefused(
            f"more than {limits.max_bytes / 1e6:g} MB", "Save it smaller, or raise max_bytes."
        )


def _decode(content: bytes, size: int, channels: int, limits: Limits) -> Decoded:
    from PIL import Image, UnidentifiedImageError

    try:
        picture: Picture = Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError:
        raise PictureRefused("neither PNG nor JPEG", "Save it as PNG or JPEG.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(limits) from None
    with picture:
        if (
            max(picture.size) > limits.max_side
            or picture.width * picture.height > limits.max_pixels
        ):
            raise _too_large(limits)
        conversions = []
        if getattr(picture, "n_frames", 1) > 1:
            # a JPEG with previews behind it is one picture; an animated PNG is not
            if picture.format != "MPO":
                raise PictureRefused("animated", "Save one frame of it.")
            conversions.append("first of several pictures in one JPEG")
        if picture.format == "PNG":
            _check_png(content)
        if picture.format == "PNG" and content[_PNG_DEPTH_BYTE] == 16:
            conversions.append("16 bits to 8")
        picture.load()
        flat = _flatten(_turn_upright(picture, conversions), conversions)
        mode = "L" if channels == 1 else "RGB"
        grey_or_colour = flat if flat.mode == mode else flat.convert(mode)
        pixels = np.asarray(_stretched(grey_or_colour, size)).reshape(size, size, channels)
        return Decoded(np.ascontiguousarray(pixels.transpose(2, 0, 1)), tuple(conversions))


def _stretched(picture: Picture, size: int) -> Picture:
    """To the square; Pillow copies what has its size already."""
    from PIL import Image

    if picture.size == (size, size):
        return picture
    return picture.resize((size, size), Image.Resampling.BILINEAR)


def _check_png(content: bytes) -> None:
    """Every chunk's own checksum, up to the last chunk.

    Pillow stops reading when it has all pixels: it shows a PNG whose end is gone, and one of whose
    data the checksum says that they are other ones, as if they were whole.

    Raises:
        ValueError: a chunk is damaged, or the end is missing.
    """
    place = _PNG_FIRST_CHUNK
    while True:
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 8 + length
        (told,) = struct.unpack_from(">I", content, end)
        if zlib.crc32(memoryview(content)[place + 4 : end]) != told:
            raise ValueError(f"the checksum of {kind!r} is wrong")
        if kind == b"IEND":
            return
        place = end + 4


def _too_large(limits: Limits) -> PictureRefused:
    return PictureRefused(
        f"more than {limits.max_pixels / 1e6:g} million pixels or {limits.max_side} a side",
        "Save it smaller, or raise max_pixels and max_side.",
    )


def _turn_upright(picture: Picture, conversions: list[str]) -> Picture:
    """Apply the camera's orientation tag, as viewers do."""
    from PIL import ImageOps

    try:
        if picture.getexif().get(_EXIF_ORIENTATION, 1) in (1, 0):
            return picture
        turned = ImageOps.exif_transpose(picture)
    except Exception:  # the tags are not the picture: it is shown as it lies
        conversions.append("unreadable EXIF tags ignored")
        return picture
    conversions.append("turned upright by its EXIF tag")
    return turned


def _flatten(picture: Picture, conversions: list[str]) -> Picture:
    """A picture of mode L or RGB: no palette, no alpha, no CMYK, 8 bits."""
    from PIL import Image

    if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
        conversions.append("transparency over white")
        page = Image.new("RGBA", picture.size, "white")
        page.alpha_composite(picture.convert("RGBA"))
        return page.convert("RGB")
    if picture.mode.startswith("I"):
        upper = np.asarray(picture).astype(np.int64) >> 8
        return Image.fromarray(np.clip(upper, 0, 255).astype(np.uint8))
    if picture.mode == "CMYK":
        conversions.append("CMYK to RGB")
        return picture.convert("RGB")
    if picture.mode in ("L", "RGB"):
        return picture
    if picture.mode in ("1", "P"):
        return picture.convert("L" if picture.mode == "1" else "RGB")
    raise PictureRefused(f"pixel type {picture.mode}", "Save it as 8-bit grey or RGB.")
