"""Stored pictures as data URIs, small enough that a report holds hundreds of them."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.markup import Markup, tag

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

MAX_SIDE = 64
"""Larger pictures are reduced to this many pixels a side."""


def picture(pixels_CHW: npt.NDArray[Any], alt: str) -> Markup:
    """An <img> of a uint8 picture [C, H, W] that carries its own bytes."""
    mime, content = encode(pixels_CHW)
    uri = f"data:{mime};base64,{base64.b64encode(content).decode()}"
    return tag("img", src=uri, alt=alt, title=alt, loading="lazy")


def encode(pixels_CHW: npt.NDArray[Any]) -> tuple[str, bytes]:
    """Media type and bytes: PNG for one channel, which line art needs; JPEG for more."""
    from PIL import Image

    image = _image(pixels_CHW)
    if max(image.size) > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if image.mode == "L":
        image.save(buffer, "PNG", optimize=True)
        return "image/png", buffer.getvalue()
    image.save(buffer, "JPEG", quality=88)
    return "image/jpeg", buffer.getvalue()


def _image(pixels_CHW: npt.NDArray[Any]) -> Picture:
    from PIL import Image

    channels = pixels_CHW.shape[0]
    if channels == 1:
        return Image.fromarray(np.ascontiguousarray(pixels_CHW[0]), "L")
    if channels == 2:
        pixels_CHW = np.concatenate([pixels_CHW, pixels_CHW[:1]])
    return Image.fromarray(np.ascontiguousarray(pixels_CHW[:3].transpose(1, 2, 0)), "RGB")
