"""The learner: what training makes, evaluation scores, and serving runs; one folder on disk.

S support examples, Q query examples, N ways.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from pipeline.algorithms.base import Adapted, Algorithm
from pipeline.algorithms.table import ALGORITHMS
from pipeline.backbones.table import BackboneSpec, ImageShape, build_model
from pipeline.core.config import Section, parse_section
from pipeline.core.errors import ArtefactError, ConfigError
from pipeline.core.files import canonical_json, read_json, verify
from pipeline.core.functional import Model
from pipeline.core.types import Params, Statistics

FORMAT_VERSION = 2
WEIGHTS, DESCRIPTION = "weights.safetensors", "learner.json"
_PARAMS, _STATISTICS = "params/", "statistics/"


class Preprocessing(Section):
    """How stored pictures become inputs: (pixel / 255 - mean) / std, channel by channel."""

    image_shape: ImageShape
    """(channels, height, width) of the uint8 pictures"""
    mean: list[float]
    """Per channel, of the training classes, in [0, 1]"""
    std: list[float]

    def __call__(self, pictures: Tensor | np.ndarray[Any, Any]) -> Tensor:
        """Float inputs [..., C, H, W] of uint8 pictures of that shape.

        Raises:
            ArtefactError: the pictures have another shape or type.
        """
        x = torch.as_tensor(pictures)
        if tuple(x.shape[-3:]) != self.image_shape or x.dtype != torch.uint8:
            raise ArtefactError(
                f"this learner takes uint8 pictures of shape {self.image_shape}, not {x.dtype} "
                f"{tuple(x.shape[-3:])}. Resize and convert them as the store does."
            )
        scale, shift = self.scale_and_shift(x.device)
        return x.to(torch.float32) * scale + shift

    def scale_and_shift(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[C, 1, 1] each: an input is pixel * scale + shift."""
        return _scale_and_shift(tuple(self.mean), tuple(self.std), device)


@lru_cache(maxsize=64)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """[C, 1, 1] each; kept, because making a tensor on a GPU from Python's numbers waits for it."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale.view(-1, 1, 1), shift.view(-1, 1, 1)


class LearnerCard(Section):
    """The description beside the weights."""

    format_version: int
    algorithm: str
    settings: dict[str, Any]
    backbone: BackboneSpec
    preprocessing: Preprocessing
    origin: dict[str, Any]
    """Where it comes from: stage, steps, validation accuracy, digests of store and tasks, ..."""


@dataclass(frozen=True)
class Learner:
    """A meta-trained model that learns new classes from a support set."""

    algorithm: Algorithm
    model: Model
    params: Params
    preprocessing: Preprocessing
    backbone: BackboneSpec
    origin: dict[str, Any]

    def adapt(
        self, support: Tensor | np.ndarray[Any, Any], labels: Tensor, num_ways: int
    ) -> Adapted:
        """Learn N classes from uint8 pictures [S, C, H, W] with labels [S] in [0, N)."""
        inputs = self.preprocessing(support)
        return self.algorithm.adapt(self.model, self.params, inputs, labels, num_ways)

    def logits(self, adapted: Adapted, query: Tensor | np.ndarray[Any, Any]) -> Tensor:
        """Log probabilities [Q, N] up to a constant, of uint8 pictures [Q, C, H, W]."""
        inputs = self.preprocessing(query)
        return self.algorithm.predict(self.model, self.params, adapted, inputs).float()

    def predict(self, adapted: Adapted, query: Tensor | np.ndarray[Any, Any]) -> Tensor:
        """Class probabilities [Q, N] of uint8 pictures [Q, C, H, W]."""
        return F.softmax(self.logits(adapted, query), dim=-1)

    @property
    def name(self) -> str:
        """The algorithm's name in the table."""
        return next(n for n, kind in ALGORITHMS.items() if isinstance(self.algorithm, kind))

    def with_algorithm(self, algorithm: Algorithm) -> Learner:
        """The same features under another algorithm that has no meta-parameters of its own."""
        model = replace(self.model, batch_norm=algorithm.batch_norm)
        return replace(self, algorithm=algorithm, model=model)


def save_learner(folder: Path, learner: Learner) -> None:
    """Write weights and description into a folder that is being built (see files.new_folder)."""
    tensors = {_PARAMS + n: v for n, v in learner.params.items()}
    tensors |= {_STATISTICS + n: v for n, v in (learner.model.statistics or {}).items()}
    cpu = {n: v.detach().to("cpu").contiguous() for n, v in sorted(tensors.items())}
    safetensors.torch.save_file(cpu, folder / WEIGHTS)
    kind: TypeAdapter[Any] = TypeAdapter(type(learner.algorithm))
    card = LearnerCard(
        format_version=FORMAT_VERSION,
        algorithm=learner.name,
        settings=kind.dump_python(learner.algorithm, mode="json"),
        backbone=learner.backbone,
        preprocessing=learner.preprocessing,
        origin=learner.origin,
    )
    (folder / DESCRIPTION).write_text(canonical_json(card.model_dump(mode="json")))


def load_learner(folder: Path, *, device: torch.device | str = "cpu") -> Learner:
    """Open a sealed learner folder: every byte is verified before any is parsed.

    The architecture is built by name from this code; nothing in the folder is ever executed.

    Raises:
        ArtefactError: the folder was altered, is no learner, or needs another version of the code.
    """
    verify(folder)
    card = _read_card(folder)
    try:
        kind: TypeAdapter[Algorithm] = TypeAdapter(ALGORITHMS[card.algorithm])
        algorithm = kind.validate_python(card.settings)
        model = build_model(card.backbone, algorithm.batch_norm)
    except (KeyError, ValidationError, ConfigError) as error:
        raise ArtefactError(
            f"{folder / DESCRIPTION} asks for {card.algorithm!r} on {card.backbone.name!r}, which "
            f"this version does not build ({error}). Use the version that made it."
        ) from None
    tensors = safetensors.torch.load_file(folder / WEIGHTS, device=str(device))
    params = _with_prefix(tensors, _PARAMS)
    statistics = _with_prefix(tensors, _STATISTICS)
    return Learner(
        algorithm,
        model.with_statistics(statistics or None),
        params,
        card.preprocessing,
        card.backbone,
        card.origin,
    )


def _read_card(folder: Path) -> LearnerCard:
    if not {WEIGHTS, DESCRIPTION} <= {p.name for p in folder.iterdir()}:
        raise ArtefactError(f"{folder} is not a learner: it lacks {WEIGHTS} or {DESCRIPTION}.")
    document = read_json(folder / DESCRIPTION)
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise ArtefactError(
            f"{folder} has learner format {json.dumps(version)}; this code reads {FORMAT_VERSION}. "
            "Use the version that made it, or train again."
        )
    try:
        return parse_section(document, LearnerCard, where=str(folder / DESCRIPTION))
    except ConfigError as error:
        raise ArtefactError(str(error)) from None


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> Statistics:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
