"""A store, opened: the manifest verified first, and each shard before its first row is used.

C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import ArtefactError
from pipeline.core.files import canonical_json, sha256_bytes, verify
from pipeline.store.schema import SCHEMA_VERSION
from pipeline.store.shards import Shards, shard_files

Rows = npt.NDArray[np.integer[Any]]
Pixels = npt.NDArray[np.uint8]

VERIFIED_AT_ONCE_BYTES = 1 << 30
"""A store of up to this size is verified whole when it is opened, in a second or less."""


@dataclass(frozen=True, slots=True)
class StoredClass:
    """One class: a contiguous range of rows."""

    name: str
    group: str
    split: str
    offset: int
    """First row."""
    count: int


@dataclass(frozen=True)
class Store:
    """Pictures of labelled classes, sorted by (split, group, class)."""

    folder: Path
    domain: str
    image_shape: tuple[int, int, int]
    mean: list[float]
    """Mean of each channel over the training rows, in [0, 1]."""
    std: list[float]
    num_rows: int
    rotation: str
    """The rule by which turned copies became classes: none, train_only or all."""
    _manifest: Mapping[str, Any] = field(repr=False)
    _shards: Shards = field(repr=False)
    _rows_per_shard: int = field(repr=False)

    @cached_property
    def classes(self) -> tuple[StoredClass, ...]:
        """All classes, in order of their rows."""
        columns = self._manifest["classes"]
        offsets = np.cumsum([0, *columns["count"]])[:-1].tolist()
        names, groups, splits = columns["name"], columns["group"], columns["split"]
        rows = zip(names, groups, splits, offsets, columns["count"], strict=True)
        return tuple(StoredClass(*row) for row in rows)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the header and the shards' hashes: the same digest, the same content.

        Over all that a reader can see of the content; not over the report of what was dropped.
        """
        header = {key: value for key, value in self._manifest.items() if key != "files"}
        shards = {name: self._manifest["files"][name] for name in self._manifest["shards"]}
        return sha256_bytes(canonical_json({"header": header, "shards": shards}).encode())

    def gather(self, rows: Rows) -> Pixels:
        """Pictures [..., C, H, W] of rows [...].

        Raises:
            ArtefactError: the store does not hold one of the rows, or its shard was altered.
        """
        rows = np.asarray(rows)
        flat = self.checked(rows).reshape(-1)
        shards = flat // self._rows_per_shard
        pictures, shifts = self._shards.window(shards)
        begins = flat * pictures.itemsize
        begins += shifts.take(shards)
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
            self._shards.names(row // self._rows_per_shard)[row % self._rows_per_shard].as_py()
            for row in self.checked(rows).ravel().tolist()
        ]

    @property
    def _images(self) -> tuple[Pixels, ...]:
        """Pictures [R, C, H, W] of every shard, in order."""
        return tuple(self._shards.images(s) for s in range(len(self._manifest["shards"])))

    def class_ids(self, split: str) -> range:
        """Global class ids of one split; empty if the store has no such classes."""
        ids = [i for i, c in enumerate(self.classes) if c.split == split]
        return range(ids[0], ids[-1] + 1) if ids else range(0)

    def split_hash(self, split: str) -> str:
        """SHA-256 of the class names and counts of one split."""
        members = [self.classes[i] for i in self.class_ids(split)]
        return sha256_bytes(canonical_json([[c.name, c.group, c.count] for c in members]).encode())


def open_store(folder: Path, *, at_once_bytes: int = VERIFIED_AT_ONCE_BYTES) -> Store:
    """Verify a store and open it.

    Every byte is verified before it is used. Of a store of up to `at_once_bytes` all are, now: a
    run does not begin on altered data. Of a larger one each shard is when the first of its rows is
    asked for: to open it takes no longer than to read its manifest.

    Raises:
        ArtefactError: it is missing, unfinished or altered, holds what stores do not hold, or was
            written by another version.
    """
    manifest = verify(folder, later="*.arrow")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ArtefactError(
            f"{folder} has store version {manifest.get('schema_version')!r}, and this program "
            f"reads version {SCHEMA_VERSION}. Make the store again (`dvc repro`)."
        )
    try:
        store = _open(folder, manifest)
        if sum(manifest["files"][name]["bytes"] for name in manifest["shards"]) <= at_once_bytes:
            store._shards.verify_all()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ArtefactError(
            f"{folder} is not a store: {error}. Make it again (`dvc repro`)."
        ) from None
    return store


def _open(folder: Path, manifest: dict[str, Any]) -> Store:
    channels, height, width = (int(side) for side in manifest["image_shape"])
    shape, per_shard = (channels, height, width), int(manifest["rows_per_shard"])
    offsets = _checked_offsets(manifest["classes"], manifest)

    def labels(first: int, last: int) -> npt.NDArray[np.int32]:
        found = np.searchsorted(offsets, np.arange(first, last), side="right") - 1
        return found.astype(np.int32)

    return Store(
        folder=folder,
        domain=manifest["domain"],
        image_shape=shape,
        mean=list(manifest["statistics"]["mean"]),
        std=list(manifest["statistics"]["std"]),
        num_rows=manifest["num_rows"],
        rotation=manifest["rotation"],
        _manifest=manifest,
        _shards=Shards(shard_files(folder, manifest), shape, per_shard, labels),
        _rows_per_shard=per_shard,
    )


def _checked_offsets(
    classes: Mapping[str, list[Any]], manifest: Mapping[str, Any]
) -> npt.NDArray[np.int64]:
    """First row of every class.

    Raises:
        ValueError: the classes, the rows and the shards do not agree.
    """
    num_rows = manifest["num_rows"]
    ends = np.cumsum(classes["count"], dtype=np.int64)
    order = {"train": 0, "val": 1, "test": 2}
    ranks = np.array([order[split] for split in classes["split"]])
    if (
        len({len(classes[name]) for name in ("name", "group", "split", "count")}) != 1
        or ends[-1] != num_rows
        or (ranks[1:] < ranks[:-1]).any()
        or -(-num_rows // manifest["rows_per_shard"]) != len(manifest["shards"])
    ):
        raise ValueError("its manifest and its rows do not agree")
    return np.concatenate([[0], ends[:-1]])
