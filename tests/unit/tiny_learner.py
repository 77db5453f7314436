"""A small real learner and bundle for tests: untrained, so it costs nothing to make."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.algorithms.protonet import ProtoNet
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.core.files import new_folder
from pipeline.deploy.bundle import Bundle, make_bundle
from pipeline.engine.learner import Learner, Preprocessing, save_learner

SHAPE = (1, 12, 12)


def tiny_learner(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Learner:
    spec = BackboneSpec(name="mlp", settings={"hidden": [16]}, image_shape=shape)
    algorithm = ProtoNet()
    model = build_model(spec, algorithm.batch_norm)
    own = algorithm.init(model.feature_dim, torch.Generator().manual_seed(seed))
    # Fixed statistics, as training leaves them: an answer must not depend on the other queries.
    noise = torch.randn(64, *shape, generator=torch.Generator().manual_seed(1))
    preprocessing = Preprocessing(image_shape=shape, mean=[0.5] * shape[0], std=[0.25] * shape[0])
    params = {**init_params(spec, seed), **own}
    _, statistics = model.features(params, noise)
    model = model.with_statistics(statistics)
    return Learner(algorithm, model, params, preprocessing, spec, {"stage": "test"})


def save(folder: Path, learner: Learner) -> Path:
    with new_folder(folder, kind="learner") as building:
        save_learner(building, learner)
    return folder


NUMBERS: dict[str, Any] = {"5w1s": {"accuracy": 0.9, "ci95": 0.01, "episodes": 100}}


def tiny_bundle(folder: Path, seed: int = 0) -> Bundle:
    learner = save(folder / f"learner-{seed}", tiny_learner(seed))
    target = folder / f"bundle-{seed}"
    return make_bundle(target, learner, NUMBERS, domain="toy", card="# A card\n")


def picture(seed: int, side: int = 12) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)


def base64_png(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
