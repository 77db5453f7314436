"""The shards of an open store, each verified before the first of its rows is used.

C channels, H and W pixels, B bytes of one picture (C * H * W), S shards.
"""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numpy.lib.stride_tricks import as_strided

from pipeline.core.errors import ArtefactError
from pipeline.store.schema import refuse_foreign_types, shard_schema

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


class Window(NamedTuple):
    """All verified shards as one array, so that one gather reads from any number of them.

    Each shard is mapped somewhere of its own. A picture is taken to begin at every byte from the
    lowest map on; only the places where one really begins are ever read.
    """

    pictures: npt.NDArray[np.void]
    """One item of B bytes at every byte"""
    shifts: Ints
    """Row r of shard s begins at byte r * B + shifts[s]."""


@dataclass(frozen=True)
class ShardFile:
    """What a shard has to be."""

    path: Path
    sha256: str
    num_rows: int


@dataclass(frozen=True)
class _Rows:
    """A verified shard's columns; the pictures lie in its map."""

    images: Pixels
    names: pa.StringArray


class Shards:
    """The files of a store, all open since the store was; nobody can put others in their place."""

    def __init__(
        self,
        files: Sequence[ShardFile],
        image_shape: tuple[int, int, int],
        rows_per_shard: int,
        labels: Callable[[int, int], npt.NDArray[np.int32]],
    ) -> None:
        """Open every file; read nothing.

        Args:
            labels: the class of rows [first, last), as the manifest has it.

        Raises:
            ArtefactError: one cannot be opened.
        """
        self._files, self._shape, self._rows_per_shard = files, image_shape, rows_per_shard
        self._labels, self._schema = labels, shard_schema(image_shape)
        self._open = [_open(file.path) for file in files]
        self._rows: list[_Rows | None] = [None] * len(files)
        self._unverified = np.ones(len(files), dtype=np.bool_)
        self._num_unverified = len(files)
        self._lock = threading.Lock()
        self._window: Window | None = None

    def window(self, touched: Ints) -> Window:
        """A window in which the shards of these numbers can be read.

        Raises:
            ArtefactError: one of them is not the file that the manifest names.
        """
        if self._num_unverified:
            self.verify(touched)
        window = self._window
        assert window is not None
        return window

    def verify(self, touched: Ints) -> None:
        """Take the hash of every shard of these numbers that has not been verified before."""
        fresh = touched[self._unverified.take(touched)]
        if not fresh.size:
            return
        with self._lock:
            done = []
            try:
                for shard in np.unique(fresh).tolist():
                    if self._unverified[shard]:
                        self._rows[shard] = self._verified(shard)
                        done.append(shard)
            finally:
                self._window = self._new_window()
                self._unverified[done] = False  # last: other threads then take the window
                self._num_unverified = int(self._unverified.sum())

    def verify_all(self) -> None:
        """Take the hash of every shard."""
        self.verify(np.arange(len(self._files)))

    def images(self, shard: int) -> Pixels:
        """Pictures [R, C, H, W] of a shard, read-only."""
        return self._row(shard).images

    def names(self, shard: int) -> pa.StringArray:
        """Names [R] of a shard."""
        return self._row(shard).names

    def _row(self, shard: int) -> _Rows:
        self.verify(np.array([shard]))
        rows = self._rows[shard]
        assert rows is not None
        return rows

    def _verified(self, shard: int) -> _Rows:
        """Hash, then map, the same open file; only then look at what it says."""
        expected, file = self._files[shard], self._open[shard]
        _check_hash(expected, file)
        content = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        file.close()  # the map holds it open
        try:
            return self._parsed(expected, content, shard * self._rows_per_shard)
        except (ValueError, pa.ArrowException) as error:
            raise ArtefactError(
                f"{expected.path} is no shard of this store: {error}. Make it again (`dvc repro`)."
            ) from None

    def _parsed(self, expected: ShardFile, content: pa.Buffer, first: int) -> _Rows:
        refuse_foreign_types(expected.path, memoryview(content))
        reader = pa.ipc.open_file(pa.BufferReader(content))
        if not reader.schema.equals(self._schema, check_metadata=True):
            raise ValueError("it has other columns than a store")
        if reader.num_record_batches != 1:
            raise ValueError("it has not exactly one batch")
        batch = reader.get_batch(0)
        batch.validate()
        labels = self._labels(first, first + expected.num_rows)
        # `to_numpy` would import pandas, a sixth of the time in which a worker starts.
        if not np.array_equal(np.from_dlpack(batch.column("label")), labels):
            raise ValueError("the manifest and its rows do not agree")
        return _Rows(batch.column("image").to_numpy_ndarray(), batch.column("name"))

    def _new_window(self) -> Window:
        images = {s: rows.images for s, rows in enumerate(self._rows) if rows is not None}
        begins = {s: _address(pictures) for s, pictures in images.items()}
        num_bytes = int(np.prod(self._shape))
        if not images:
            return Window(np.empty(0, f"V{num_bytes}"), np.zeros(len(self._files), np.int64))
        lowest = min(begins, key=begins.__getitem__)
        highest = max(begins, key=begins.__getitem__)
        first = images[lowest].reshape(-1, num_bytes).view(f"V{num_bytes}")
        last = begins[highest] - begins[lowest] + (len(images[highest]) - 1) * num_bytes
        shifts = np.zeros(len(self._files), np.int64)
        for shard, begin in begins.items():
            shifts[shard] = begin - begins[lowest] - self._rows_per_shard * shard * num_bytes
        pictures = as_strided(first, shape=(last + 1,), strides=(1,), writeable=False)
        return Window(pictures, shifts)


def _check_hash(expected: ShardFile, file: BufferedReader) -> None:
    file.seek(0)
    if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
        raise ArtefactError(
            f"{expected.path} was altered: its SHA-256 is not the recorded one. Restore it (`dvc "
            "checkout`) or make it again (`dvc repro`). If it was being made just now, run the "
            "same command again."
        )


def _address(pictures: Pixels) -> int:
    address: int = pictures.__array_interface__["data"][0]
    return address


def _open(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise ArtefactError(
            f"{path} cannot be opened: {error}. If there are too many open files, allow more of "
            "them (`ulimit -n`), or raise preprocess.rows_per_shard."
        ) from None


def shard_files(folder: Path, manifest: dict[str, Any]) -> list[ShardFile]:
    """What the manifest says about each shard, in order."""
    per_shard, total = manifest["rows_per_shard"], manifest["num_rows"]
    return [
        ShardFile(
            folder / name,
            manifest["files"][name]["sha256"],
            min(per_shard, total - index * per_shard),
        )
        for index, name in enumerate(manifest["shards"])
    ]
