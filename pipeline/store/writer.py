"""Rows of pictures, written as a store: all or nothing, and the same bytes for the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.core.errors import StorageError
from pipeline.core.files import new_folder, write_json
from pipeline.store.reader import StoredClass
from pipeline.store.schema import SCHEMA_VERSION, image_type, shard_schema

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class StoreContent:
    """What a store will hold: picture `order[i]` of `pixels` becomes row i."""

    domain: str
    classes: tuple[StoredClass, ...]
    pixels: Pixels
    """Pictures [..., C, H, W] in any order."""
    order: npt.NDArray[np.int64]
    names: Sequence[str]
    """One per row."""
    rotation: str = "none"
    """The rule by which turned copies became classes."""


def write_store(
    target: Path, content: StoreContent, *, rows_per_shard: int, report: dict[str, Any]
) -> None:
    """Write shards, report and manifest beside `target`, then put them in its place.

    Raises:
        StorageError: the disk refused; what was at `target` is as it was.
    """
    try:
        _write(target, content, rows_per_shard=rows_per_shard, report=report)
    except OSError as error:
        raise refused(target, error) from error


def refused(target: Path, error: OSError) -> StorageError:
    """What to tell when the disk does not take a store."""
    return StorageError(
        f"cannot write the store {target}: {error}. What was there is as it was. Free some space "
        "or mend the disk, then run the same command again."
    )


def _write(
    target: Path, content: StoreContent, *, rows_per_shard: int, report: dict[str, Any]
) -> None:
    num_rows = len(content.order)
    starts = range(0, num_rows, rows_per_shard)
    shards = [f"shard-{index:05d}.arrow" for index in range(len(starts))]
    labels = np.repeat(
        np.arange(len(content.classes), dtype=np.int32), [c.count for c in content.classes]
    )
    header = {
        "schema_version": SCHEMA_VERSION,
        "domain": content.domain,
        "rotation": content.rotation,
        "image_shape": list(content.pixels.shape[1:]),
        "num_rows": num_rows,
        "rows_per_shard": rows_per_shard,
        "shards": shards,
        "classes": {  # by column: half a million of them are read in a tenth of a second
            column: [getattr(c, column) for c in content.classes]
            for column in ("name", "group", "split", "count")
        },
        "statistics": training_statistics(content),
    }
    with new_folder(target, **header) as folder:
        for name, start in zip(shards, starts, strict=True):
            rows = slice(start, start + rows_per_shard)
            _write_shard(
                folder / name,
                content.pixels[content.order[rows]],
                labels[rows],
                content.names[rows],
            )
        write_json(folder / "report.json", report)


def training_statistics(content: StoreContent) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel over the training rows, on the scale [0, 1].

    Counted in integers, so that neither the order of rows nor the machine matters.
    """
    num_rows = sum(c.count for c in content.classes if c.split == "train")
    _, channels, height, width = content.pixels.shape
    histogram = np.zeros((channels, 256), dtype=np.int64)
    for start in range(0, num_rows, 4096):
        block = content.pixels[content.order[start : min(start + 4096, num_rows)]]
        for channel in range(channels):
            histogram[channel] += np.bincount(block[:, channel].ravel(), minlength=256)
    total = num_rows * height * width
    values = np.arange(256, dtype=np.int64)
    means = [int(row @ values) / total for row in histogram]
    squares = [int(row @ values**2) / total for row in histogram]
    return {
        "mean": [mean / 255 for mean in means],
        "std": [max(s - m * m, 0.0) ** 0.5 / 255 for m, s in zip(means, squares, strict=True)],
    }


def _write_shard(
    path: Path, pixels: Pixels, labels: npt.NDArray[np.int32], names: Sequence[str]
) -> None:
    shape = tuple(pixels.shape[1:])
    flat = pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(pixels).reshape(-1)), int(np.prod(shape))
    )
    images = pa.ExtensionArray.from_storage(image_type(shape), flat)
    columns = [images, pa.array(labels), pa.array(list(names), pa.string())]
    schema = shard_schema(shape)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
