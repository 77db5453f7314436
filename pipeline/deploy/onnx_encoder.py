"""A learner's encoder as an ONNX file, kept only if it gives the features that the service gives.

B pictures, D features.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import __version__
from pipeline.core.errors import ArtefactError, MachineError
from pipeline.core.files import write_bytes
from pipeline.deploy.bundle import Bundle
from pipeline.deploy.serve.messages import ModelRef
from pipeline.deploy.serve.model import Pictures, Version
from pipeline.engine.features import caches_features
from pipeline.engine.learner import Learner

INPUT, OUTPUT = "pictures", "features"
LIMIT = 1e-4
"""Largest relative difference of features; float32 in another order of sums leaves some 1e-6."""
NUM_PICTURES = 64
_BATCHES = (64, 7, 1)
_ROWS_PER_PASS = 64
_SMALLEST_SCALE = 1e-3
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """An encoder that was written."""

    file: Path
    bytes: int
    bundle: str
    """Digest of the bundle that it comes from."""
    input: str
    output: str
    difference: float
    """Largest relative difference to the service's features, of the pictures it was tried on."""
    limit: float
    pictures: int


class Encoder(nn.Module):
    """Features [B, D] of uint8 pictures [B, C, H, W], weights and preprocessing inside."""

    scale: Tensor
    shift: Tensor

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self._model = learner.model
        # torch.export would leave its stand-ins in the cache of `preprocessing`; these are its
        # numbers.
        scale, shift = learner.preprocessing.scale_and_shift(torch.device("cpu"))
        self._params = self._keep("param", learner.params)
        self._statistics = self._keep("statistic", learner.model.statistics or {})
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def _keep(self, kind: str, tensors: dict[str, Tensor]) -> dict[str, str]:
        """Register tensors as buffers, whose names hold no dots; returns these names."""
        names = {name: f"{kind}_{i}" for i, name in enumerate(sorted(tensors))}
        for name, own in names.items():
            self.register_buffer(own, tensors[name].detach().cpu())
        return names

    def forward(self, pictures: Tensor) -> Tensor:
        """The same steps as `Version.embed`."""
        inputs = pictures.to(torch.float32) * self.scale + self.shift
        params = {name: getattr(self, own) for name, own in self._params.items()}
        statistics = {name: getattr(self, own) for name, own in self._statistics.items()}
        return self._model.features(params, inputs, statistics)[0]


def export_encoder(bundle: Bundle, file: Path, *, origin: str = "") -> Exported:
    """Write the encoder of a bundle's learner, tried before it lies there, whole or not at all.

    Args:
        origin: the version's address, for the file's metadata.

    Raises:
        ArtefactError: this learner has no encoder of its own, or onnxruntime gives other features
            than the service; nothing is written then.
        MachineError: the extra is missing, or the file cannot be written.
    """
    if lost := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise MachineError(
            f"{', '.join(lost)} not installed. Install it: pip install 'metaloom[onnx]'."
        )
    check_has_encoder(bundle.learner)
    content = encode(bundle, origin)
    found = check(content, bundle)
    try:
        write_bytes(file, content)
    except OSError as error:
        raise MachineError(
            f"{file} cannot be written: {error}. Name another file after --onnx."
        ) from None
    channels, height, width = bundle.learner.preprocessing.image_shape
    return Exported(
        file=file,
        bytes=len(content),
        bundle=bundle.digest,
        input=f"uint8 [batch, {channels}, {height}, {width}]",
        output=f"float32 [batch, {bundle.learner.model.feature_dim}]",
        difference=found,
        limit=LIMIT,
        pictures=NUM_PICTURES,
    )


def check_has_encoder(learner: Learner) -> None:
    """Whether a picture has features of its own, whatever else is in its episode.

    Raises:
        ArtefactError: it has not; says why.
    """
    if caches_features(learner):
        return
    if not learner.algorithm.embeds_each_example:
        why = "adapts its network to each support set, so a picture has no features before that"
    elif learner.model.batch_norm != "running":
        why = (
            f"takes its batch statistics from each episode (batch_norm: {learner.model.batch_norm})"
            ", so a picture's features depend on the others"
        )
    else:
        why = "has no measured batch statistics, so a picture's features depend on the others"
    raise ArtefactError(
        f"{learner.name} on {learner.backbone.name} cannot be exported: it {why}. Export a learner "
        "that embeds each picture alone, such as protonet with batch_norm: running, or serve this "
        "one by `metaloom serve`."
    )


def encode(bundle: Bundle, origin: str = "") -> bytes:
    """The ONNX model of the encoder; the same bundle and origin give the same bytes.

    Raises:
        ArtefactError: PyTorch cannot write this network.
    """
    import onnx

    channels, height, width = bundle.learner.preprocessing.image_shape
    # Two pictures, for a batch of one would be taken for a constant.
    example = torch.zeros(2, channels, height, width, dtype=torch.uint8)
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                Encoder(bundle.learner).eval(),
                (example,),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1)}},
                external_data=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ArtefactError(
            f"PyTorch cannot write {bundle.learner.backbone.name} as ONNX: "
            f"{str(error).strip().splitlines()[0]}"
        ) from None
    assert program is not None
    model = program.model_proto
    _forget_machine(model)
    onnx.helper.set_model_props(model, _metadata(bundle, origin))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def check(content: bytes, bundle: Bundle) -> float:
    """The largest relative difference of an ONNX model's features to the service's.

    Raises:
        ArtefactError: it is above `LIMIT`, or no number.
    """
    found = difference(content, bundle)
    if not found <= LIMIT:
        raise ArtefactError(
            f"the ONNX encoder of bundle {bundle.digest[:12]}… does not give the service's "
            f"features: on {NUM_PICTURES} made-up pictures they differ by {found:.2g} relative, "
            f"more than {LIMIT:.0e}. Nothing was written. Look at the versions of onnxruntime and "
            "torch (constraints.txt has those that agree)."
        )
    return found


def difference(content: bytes, bundle: Bundle) -> float:
    """max_i |g_i - f_i| / |f_i|, of onnxruntime's features g and the service's f of pictures i.

    Lengths are Euclidean; an |f_i| below a thousandth of the longest counts as that, for a network
    may give a picture no features at all. Infinite where anything is no number, or has another
    shape. Batches of 64, 7 and 1 are tried.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    shape = bundle.learner.preprocessing.image_shape
    pictures = made_up_pictures(shape)
    ref = ModelRef(name="export", version=None, bundle=bundle.digest)
    wanted = Version(ref, bundle, _ROWS_PER_PASS).embed(pictures).double().numpy()
    norms = np.linalg.norm(wanted, axis=1)
    scale = np.maximum(norms, max(_SMALLEST_SCALE * norms.max(), np.finfo(np.float32).tiny))
    largest = 0.0
    for size in _BATCHES:
        batches = [pictures[i : i + size] for i in range(0, NUM_PICTURES, size)]
        found = np.concatenate([session.run([OUTPUT], {INPUT: batch})[0] for batch in batches])
        if found.shape != wanted.shape or not np.isfinite(found).all():
            return float("inf")
        off = np.linalg.norm(found.astype(np.float64) - wanted, axis=1) / scale
        largest = max(largest, float(off.max()))
    return largest


def made_up_pictures(shape: tuple[int, int, int]) -> Pictures:
    """64 pictures [64, C, H, W], always the same: black, white, noise of all contrasts, strokes."""
    rng = np.random.default_rng(0)
    contrast = np.linspace(0, 1, NUM_PICTURES)[:, None, None, None]
    pictures = rng.integers(0, 256, (NUM_PICTURES, *shape)) * contrast
    for i, picture in enumerate(pictures[1::2]):
        picture[:, i % shape[1], :] = 255
        picture[:, :, (7 * i) % shape[2]] = 255
    pictures[0], pictures[1] = 0, 255
    return pictures.astype(np.uint8)


def _metadata(bundle: Bundle, origin: str) -> dict[str, str]:
    learner = bundle.learner
    return {
        "metaloom.bundle": bundle.digest,
        "metaloom.weights": bundle.weights_digest,
        "metaloom.origin": origin or "a folder",
        "metaloom.domain": bundle.domain,
        "metaloom.algorithm": learner.name,
        "metaloom.backbone": learner.backbone.name,
        "metaloom.input": "uint8 pictures [batch, channels, height, width], as the store holds "
        "them; they are normalised inside",
        "metaloom.output": "features; there are no labels in here, classes come from support sets",
        "metaloom.limit": repr(LIMIT),
        "metaloom.version": __version__,
        "metaloom.torch": torch.__version__,
    }


def _forget_machine(model: Any) -> None:
    """Take out what the exporter notes of the source, with the paths of the machine it ran on."""
    graph = model.graph
    for noted in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        noted.ClearField("metadata_props")
        noted.ClearField("doc_string")
    for tensor in graph.initializer:
        tensor.ClearField("metadata_props")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on torchvision, which no network here uses, and on itself."""
    noisy = logging.getLogger("torch.onnx")
    before = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=FutureWarning)
            yield
    finally:
        noisy.setLevel(before)
