"""From a request's inputs to the pictures that a model takes; judged before anything is decoded."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core.errors import DataError
from pipeline.core.files import canonical_json
from pipeline.deploy.serve.messages import Input, Label
from pipeline.deploy.serve.model import Pictures
from pipeline.deploy.serve.problems import Problem
from pipeline.deploy.serve.settings import Limits
from pipeline.domains.pictures import Limits as PictureLimits
from pipeline.domains.pictures import decode_picture, num_pixels

PICTURE, VECTOR = "picture", "vector"


@dataclass(frozen=True)
class Item:
    """An input as it is kept: the very bytes that were sent."""

    kind: str
    content: bytes

    @property
    def digest(self) -> str:
        """Of the content; what a learner's name is made of."""
        return hashlib.sha256(self.content).hexdigest()


def check_support(labels: Sequence[Label], limits: Limits) -> None:
    """Raises Problem 422: too few classes, or too many classes or examples of one."""
    shots: dict[Any, int] = {}
    for label in labels:
        shots[label] = shots.get(label, 0) + 1
    if not 2 <= len(shots) <= limits.ways:
        raise Problem(
            422,
            f"support: {len(shots)} different labels; 2 to {limits.ways} are allowed. "
            "Add a class, or make several learners.",
        )
    most = max(shots, key=lambda label: shots[label])
    if shots[most] > limits.shots:
        raise Problem(
            422,
            f"support: {shots[most]} examples of one class; at most {limits.shots} are allowed. "
            "Leave some out.",
        )


def check_queries(queries: Sequence[Input], limits: Limits) -> None:
    """Raises Problem 422: too many."""
    if len(queries) > limits.queries:
        detail = f"queries: {len(queries)}; at most {limits.queries} are allowed. Ask in parts."
        raise Problem(422, detail)


def items_of(inputs: Sequence[Input], place: str) -> list[Item]:
    """The bytes of every input.

    Raises:
        Problem: 422, one is no base64, or a text.
    """
    return [_item(one, f"{place}[{i}]") for i, one in enumerate(inputs)]


def _item(one: Input, place: str) -> Item:
    if one.text is not None:
        raise Problem(422, f"{place}: this model takes pictures, not texts. Send `image`.")
    if one.vector is not None:
        return Item(VECTOR, canonical_json(one.vector).encode())
    text = one.image or ""
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return Item(PICTURE, base64.b64decode(encoded, validate=True))
    except (binascii.Error, ValueError):
        raise Problem(
            422, f"{place}: the image is not base64. Send the file's bytes, base64-encoded."
        ) from None


def decode(
    items: Sequence[Item], shape: tuple[int, int, int], limits: Limits, place: str
) -> Pictures:
    """Pictures [n, C, H, W] as the model's store would hold them.

    Raises:
        Problem: 422, one is too large, damaged, of another kind or shape; says which.
    """
    _check_pixels(items, limits, place)
    bounds = PictureLimits(limits.body_bytes, limits.pixels, limits.side)
    pictures = []
    for i, item in enumerate(items):
        try:
            if item.kind == VECTOR:
                pictures.append(_from_vector(item.content, shape))
            else:
                decoded = decode_picture(
                    item.content, size=shape[1], channels=shape[0], limits=bounds
                )
                pictures.append(decoded.pixels)
        except DataError as error:
            raise Problem(422, f"{place}[{i}]: {error}") from None
    return np.stack(pictures)


def _check_pixels(items: Sequence[Item], limits: Limits, place: str) -> None:
    together = sum(num_pixels(item.content) for item in items if item.kind == PICTURE)
    if len(items) > 1 and together > limits.pixels_together:
        raise Problem(
            422,
            f"{place}: {together / 1e6:.1f} million pixels together; at most "
            f"{limits.pixels_together / 1e6:g} are allowed. Send smaller pictures, or fewer.",
        )


def _from_vector(content: bytes, shape: tuple[int, int, int]) -> Pictures:
    values = np.asarray(json.loads(content), dtype=np.float64)
    channels, height, width = shape
    if values.size != channels * height * width:
        raise DataError(
            f"a vector of {values.size} values; the model takes {channels} x {height} x {width} = "
            f"{channels * height * width} of them."
        )
    if values.min() < 0 or values.max() > 255:
        raise DataError("a vector's values are from 0 to 255, as stored pictures have them.")
    return values.round().astype(np.uint8).reshape(shape)
