"""A store, opened: every byte verified first, then memory-mapped.

C channels, H and W pixels, R rows, B bytes of one picture (C * H * W).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numpy.lib.stride_tricks import as_strided

from pipeline.core.errors import ArtefactError
from pipeline.core.files import canonical_json, sha256_bytes, verify
from pipeline.store.schema import SCHEMA_VERSION, refuse_foreign_types, shard_schema

Rows = npt.NDArray[np.integer[Any]]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class StoredClass:
    """One class: a contiguous range of rows."""

    name: str
    group: str
    split: str
    offset: int
    """First row."""
    count: int


class _Window(NamedTuple):
    """All shards as one array, so that one gather reads from any number of them.

    Each shard is mapped somewhere of its own. A picture is taken to begin at every byte from the
    lowest map on; only the places where one really begins are ever read.
    """

    pictures: npt.NDArray[np.void]
    """One item of B bytes at every byte"""
    shifts: npt.NDArray[np.int64]
    """Row r of shard s begins at byte r * B + shifts[s]."""


@dataclass(frozen=True)
class Store:
    """Pictures of labelled classes, sorted by (split, group, class)."""

    folder: Path
    domain: str
    image_shape: tuple[int, int, int]
    classes: tuple[StoredClass, ...]
    mean: list[float]
    """Mean of each channel over the training rows, in [0, 1]."""
    std: list[float]
    num_rows: int
    rotation: str
    """The rule by which turned copies became classes: none, train_only or all."""
    digest: str
    """SHA-256 over the header and the shards' hashes: the same digest, the same content."""
    _images: tuple[Pixels, ...] = field(repr=False)
    _window: _Window = field(repr=False)
    _names: tuple[Any, ...] = field(repr=False)
    _rows_per_shard: int = field(repr=False)

    def gather(self, rows: Rows) -> Pixels:
        """Pictures [..., C, H, W] of rows [...].

        Raises:
            ArtefactError: the store does not hold one of the rows.
        """
        rows = np.asarray(rows)
        flat = self.checked(rows).reshape(-1)
        pictures, shifts = self._window
        begins = flat * pictures.itemsize
        begins += shifts.take(flat // self._rows_per_shard)
        return pictures[begins].view(np.uint8).reshape(*rows.shape, *self.image_shape)

    def checked(self, rows: Rows) -> npt.NDArray[np.int64]:
        """The same rows, once it is sure that the store holds them all.

        Raises:
            ArtefactError: it does not hold one of them.
        """
        known: npt.NDArray[np.int64] = np.asarray(rows, dtype=np.int64, order="C")
        if known.size and known.view(np.uint64).max() >= self.num_rows:  # negative ones are huge
            outside = known[(known < 0) | (known >= self.num_rows)].ravel()[0]
            raise ArtefactError(
                f"{self.folder} has rows 0 to {self.num_rows - 1}; row {outside} was asked for. "
                "These episodes were drawn from another store: draw them again (`dvc repro "
                "sample_tasks`)."
            )
        return known

    def labels(self) -> npt.NDArray[np.int32]:
        """The global class id of every row."""
        counts = [c.count for c in self.classes]
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def names(self, rows: Rows) -> list[str]:
        """What the example of each row is: a typeface, a drawer, a file's path."""
        return [
            self._names[row // self._rows_per_shard][row % self._rows_per_shard].as_py()
            for row in self.checked(rows).ravel().tolist()
        ]

    def class_ids(self, split: str) -> range:
        """Global class ids of one split; empty if the store has no such classes."""
        ids = [i for i, c in enumerate(self.classes) if c.split == split]
        return range(ids[0], ids[-1] + 1) if ids else range(0)

    def split_hash(self, split: str) -> str:
        """SHA-256 of the class names and counts of one split."""
        members = [self.classes[i] for i in self.class_ids(split)]
        return sha256_bytes(canonical_json([[c.name, c.group, c.count] for c in members]).encode())


def open_store(folder: Path) -> Store:
    """Verify every byte of a store, then map it.

    Raises:
        ArtefactError: it is missing, unfinished or altered, holds what stores do not hold, or was
            written by another version.
    """
    manifest = verify(folder)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ArtefactError(
            f"{folder} has store version {manifest.get('schema_version')!r}, and this program "
            f"reads version {SCHEMA_VERSION}. Make the store again (`dvc repro`)."
        )
    try:
        return _open(folder, manifest)
    except (KeyError, TypeError, ValueError, IndexError, pa.ArrowException) as error:
        raise ArtefactError(
            f"{folder} is not a store: {error}. Make it again (`dvc repro`)."
        ) from None


def _open(folder: Path, manifest: Mapping[str, Any]) -> Store:
    channels, height, width = (int(side) for side in manifest["image_shape"])
    shape = (channels, height, width)
    digest = _digest(manifest)  # first: it also sees that every shard is a file of the manifest
    classes = tuple(StoredClass(**entry) for entry in manifest["classes"])
    tables = [_open_shard(folder / name, shape) for name in manifest["shards"]]
    images = tuple(t.column("image").to_numpy_ndarray() for t in tables)
    store = Store(
        folder=folder,
        domain=manifest["domain"],
        image_shape=shape,
        classes=classes,
        mean=list(manifest["statistics"]["mean"]),
        std=list(manifest["statistics"]["std"]),
        num_rows=manifest["num_rows"],
        rotation=manifest["rotation"],
        digest=digest,
        _images=images,
        _window=_window(images, manifest["rows_per_shard"]),
        _names=tuple(t.column("name") for t in tables),
        _rows_per_shard=manifest["rows_per_shard"],
    )
    stored = np.concatenate([t.column("label").to_numpy() for t in tables])
    _check_rows(store, stored, [t.num_rows for t in tables])
    return store


def _open_shard(path: Path, shape: tuple[int, int, int]) -> pa.RecordBatch:
    refuse_foreign_types(path)
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    if not reader.schema.equals(shard_schema(shape), check_metadata=True):
        raise ArtefactError(f"{path} has other columns than a store. Make it again (`dvc repro`).")
    if reader.num_record_batches != 1:
        raise ArtefactError(f"{path} has not exactly one batch. Make it again (`dvc repro`).")
    batch = reader.get_batch(0)
    batch.validate()
    return batch


def _window(images: Sequence[Pixels], rows_per_shard: int) -> _Window:
    begins = np.array([shard.__array_interface__["data"][0] for shard in images], np.int64)
    lowest, highest = int(begins.argmin()), int(begins.argmax())
    num_bytes = images[lowest][0].size
    first = images[lowest].reshape(-1, num_bytes).view(f"V{num_bytes}")
    last_picture = int(begins[highest] - begins[lowest]) + (len(images[highest]) - 1) * num_bytes
    pictures = as_strided(first, shape=(last_picture + 1,), strides=(1,), writeable=False)
    rows_before = rows_per_shard * np.arange(len(images), dtype=np.int64)
    return _Window(pictures, begins - begins[lowest] - rows_before * num_bytes)


def _check_rows(store: Store, labels: npt.NDArray[np.int32], shard_rows: list[int]) -> None:
    full, last = shard_rows[:-1], shard_rows[-1]
    per_shard = store._rows_per_shard
    ends = np.cumsum([c.count for c in store.classes])
    starts = [c.offset for c in store.classes]
    order = ["train", "val", "test"]
    ranks = [order.index(c.split) for c in store.classes]
    if (
        any(rows != per_shard for rows in full)
        or last > per_shard
        or starts != [0, *ends[:-1].tolist()]
        or ends[-1] != store.num_rows
        or ranks != sorted(ranks)
        or not np.array_equal(labels, store.labels())
    ):
        raise ValueError("its manifest and its rows do not agree")


def _digest(manifest: Mapping[str, Any]) -> str:
    """Over all that a reader can see of the content; not over the report of what was dropped."""
    header = {key: value for key, value in manifest.items() if key != "files"}
    shards = {name: manifest["files"][name] for name in manifest["shards"]}
    return sha256_bytes(canonical_json({"header": header, "shards": shards}).encode())
