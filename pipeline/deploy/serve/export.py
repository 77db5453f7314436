"""A learner as a zip: its description, its tensors, its examples, and hashes of them all."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence

import safetensors.torch

from pipeline.core.files import canonical_json
from pipeline.deploy.serve.inputs import PICTURE, Item
from pipeline.deploy.serve.learners import Kept
from pipeline.deploy.serve.model import Ready
from pipeline.deploy.serve.telling import told

_EPOCH = (1980, 1, 1, 0, 0, 0)
_PNG = b"\x89PNG"


def media_type(item: Item) -> str:
    """Of an example as it was sent."""
    if item.kind != PICTURE:
        return "application/json"
    return "image/png" if item.content.startswith(_PNG) else "image/jpeg"


def archive(kept: Kept, ready: Ready, items: Sequence[Item]) -> bytes:
    """The zip's bytes; the same learner under the same version gives the same ones.

    `tensors.safetensors` holds what the algorithm keeps of the support set (`adapted/...`), the
    batch-norm statistics for its queries where it keeps any (`statistics/...`), and the features of
    the examples (`support`, of unit length).
    """
    adapted = ready.adapted
    tensors = {f"adapted/{name}": value for name, value in adapted.tensors.items()}
    tensors |= {f"statistics/{name}": value for name, value in (adapted.statistics or {}).items()}
    tensors["support"] = ready.support
    files = {
        "learner.json": told(kept).model_dump_json(indent=2).encode(),
        "labels.json": canonical_json(list(kept.labels)).encode(),
        "tensors.safetensors": safetensors.torch.save(
            {name: value.contiguous() for name, value in sorted(tensors.items())}
        ),
    }
    for number, item in enumerate(items):
        ending = {"image/png": "png", "image/jpeg": "jpg"}.get(media_type(item), "json")
        files[f"support/{number:04d}.{ending}"] = item.content
    manifest = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    header = {"kind": "metaloom learner", "files": manifest}
    files["manifest.json"] = canonical_json(header).encode()
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            packed.writestr(zipfile.ZipInfo(name, _EPOCH), content, zipfile.ZIP_DEFLATED)
    return target.getvalue()
