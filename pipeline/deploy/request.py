"""What a client asks and what it is told: a support set and queries in, classes out."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from pipeline.core.errors import DataError
from pipeline.domains.pictures import decode_picture
from pipeline.engine.learner import Learner

MAX_WAYS = 200
MAX_SUPPORT = 2000
MAX_QUERIES = 500
MAX_PICTURE_BYTES = 10_000_000
MAX_BODY_BYTES = 64_000_000
"""Of all pictures of one request together, decoded from base64."""

_FORM = (
    'A request is {"support": [{"image": "<base64>", "label": "cat"}, ...], '
    '"query": ["<base64>", ...]}.'
)

Label = StrictInt | StrictStr


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SupportExample(_Message):
    """One labelled picture."""

    image: str = Field(description="PNG or JPEG, base64")
    label: Label = Field(description="its class: any text or integer; comes back as given")


class EpisodeRequest(_Message):
    """A few labelled examples of each class, and the pictures to be classified."""

    support: list[SupportExample]
    query: list[str] = Field(description="PNG or JPEG pictures, base64")


class EpisodeAnswer(_Message):
    """What the learner says about every query, in their order."""

    labels: list[Label] = Field(description="the most probable class of each query")
    classes: list[Label] = Field(description="all classes, in order of first appearance")
    probabilities: list[list[float]] = Field(description="[query][class], each row adds up to 1")


def parse_request(value: Any) -> EpisodeRequest:
    """Check the form of a request.

    Raises:
        DataError: it has another form; the message names the first places, never the pictures.
    """
    try:
        return EpisodeRequest.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)
        places = [f"{_place(problem['loc'])}: {problem['msg']}" for problem in found[:3]]
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise DataError(f"the request is not usable: {'; '.join(places)}{more}. {_FORM}") from None


def _place(location: tuple[int | str, ...]) -> str:
    """support[2].label, without the names of the types that were tried."""
    known = [part for part in location if isinstance(part, int) or part not in {"int", "str"}]
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in known)
    return text.removeprefix(".") or "the request"


def answer(learner: Learner, request: EpisodeRequest) -> EpisodeAnswer:
    """Learn the classes of the support set, then classify the queries.

    Raises:
        DataError: a limit is exceeded or a picture cannot be used; the message says which.
    """
    classes, targets = _check(request)
    examples = [(f"support[{i}]", e.image) for i, e in enumerate(request.support)]
    queries = [(f"query[{i}]", image) for i, image in enumerate(request.query)]
    pictures = _decode(learner, [*examples, *queries])
    with torch.no_grad():
        adapted = learner.adapt(pictures[: len(examples)], torch.tensor(targets), len(classes))
        probabilities = learner.predict(adapted, pictures[len(examples) :])
    best = probabilities.argmax(dim=1).tolist()
    return EpisodeAnswer(
        labels=[classes[i] for i in best],
        classes=classes,
        probabilities=[[float(p) for p in row] for row in probabilities.tolist()],
    )


def _check(request: EpisodeRequest) -> tuple[list[Label], list[int]]:
    """Classes in order of first appearance, and each example's position among them."""
    position = {label: i for i, label in enumerate(dict.fromkeys(e.label for e in request.support))}
    for what, number, least, most in (
        ("support examples", len(request.support), 1, MAX_SUPPORT),
        ("different labels", len(position), 2, MAX_WAYS),
        ("queries", len(request.query), 1, MAX_QUERIES),
    ):
        if not least <= number <= most:
            raise DataError(
                f"the request holds {number} {what}; {least} to {most} are allowed. "
                "Split it into several requests, or add examples."
            )
    return list(position), [position[e.label] for e in request.support]


def _decode(learner: Learner, images: Sequence[tuple[str, str]]) -> npt.NDArray[np.uint8]:
    """Pictures [n, C, H, W] as the learner's store would hold them."""
    channels, height, _ = learner.preprocessing.image_shape
    if sum(len(text) for _, text in images) * 3 // 4 > MAX_BODY_BYTES:
        raise DataError(
            f"the pictures are larger than {MAX_BODY_BYTES:,} bytes together. Send smaller ones: "
            f"the learner sees {height} x {height} pixels."
        )
    pictures = []
    for place, text in images:
        try:
            decoded = decode_picture(_bytes(text), size=height, channels=channels)
            pictures.append(decoded.pixels)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
    return np.stack(pictures)


def _bytes(text: str) -> bytes:
    """Base64 with or without the `data:image/...;base64,` that browsers put before it."""
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise DataError("the image is not base64. Send the file's bytes, base64-encoded.") from None
    if len(content) > MAX_PICTURE_BYTES:
        raise DataError(
            f"the picture has {len(content):,} bytes, more than {MAX_PICTURE_BYTES:,}. "
            "Send a smaller one."
        )
    return content
