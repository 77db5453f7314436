"""Validation and test episodes: drawn once, kept as Arrow tables with a hash."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.core.errors import ArtefactError, TaskError
from pipeline.core.files import sha256_file, verify
from pipeline.store.reader import Store
from pipeline.tasks.sampler import (
    TEST_STREAM,
    VAL_STREAM,
    Episodes,
    check_possible,
    class_table,
    examples_needed,
    sample,
)
from pipeline.tasks.spec import EpisodeSpec, FrozenSpec

SCHEMA_VERSION = 1
_STREAMS = {"val": VAL_STREAM, "test": TEST_STREAM}
Rows = npt.NDArray[np.int32]


@dataclass(frozen=True)
class FrozenEpisodes:
    """One set of kept episodes: E episodes, N ways, S support rows, Q query rows."""

    name: str
    """Such as "5w1s"."""
    split: str
    num_ways: int
    num_shots: int
    num_queries: int
    support_rows: Rows
    """[E, S] store rows"""
    support_labels: Rows
    """[E, S]"""
    query_rows: Rows
    """[E, Q] store rows"""
    query_labels: Rows
    """[E, Q]"""
    classes: Rows
    """[E, N] the store's class id of each label"""
    digest: str
    """SHA-256 of the file that they came from."""
    protocol: dict[str, Any]
    """What a number measured on them must name."""


def draw_frozen(
    store: Store, split: str, spec: FrozenSpec, *, ways: int, shots: int, seed: int
) -> tuple[Episodes, dict[str, Any]]:
    """Draw one set of episodes and state its protocol.

    Raises:
        TaskError: the split cannot fill such episodes.
    """
    shape = EpisodeSpec(
        ways=ways, shots=shots, queries=spec.queries, within_group=spec.within_group
    )
    table = class_table(store, split, min_examples=examples_needed(shape))
    check_possible(table, shape, ways=ways, shots=shots)
    episodes = sample(
        table,
        shape,
        ways=ways,
        shots=shots,
        seed=seed,
        stream=_STREAMS[split],
        indices=_disjoint_indices(ways, shots, spec.episodes),
    )
    return episodes, {
        "domain": store.domain,
        "store_digest": store.digest,
        "split": split,
        "split_hash": store.split_hash(split),
        "classes": len(table.ids),
        "classes_too_small": len(store.class_ids(split)) - len(table.ids),
        "ways": ways,
        "shots": shots,
        "queries": spec.queries,
        "within_group": spec.within_group,
        "rotation": store.rotation,
        "episodes": spec.episodes,
        "seed": seed,
    }


def _disjoint_indices(ways: int, shots: int, count: int) -> npt.NDArray[np.int64]:
    """Own stretch of the stream for each setting, so that no two settings share random words."""
    return ((ways << 16) + shots << 32) + np.arange(count, dtype=np.int64)


def write_episodes(path: Path, episodes: Episodes, protocol: dict[str, Any]) -> None:
    """Write one set as an Arrow IPC file: one row an episode, the protocol in the schema."""
    columns = {
        name: pa.FixedSizeListArray.from_arrays(
            pa.array(values.astype(np.int32).ravel()), values.shape[1]
        )
        for name, values in episodes._asdict().items()
    }
    metadata = {"protocol": json.dumps({"schema_version": SCHEMA_VERSION, **protocol})}
    table = pa.table(columns).replace_schema_metadata(metadata)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_episodes(folder: Path, split: str) -> dict[str, FrozenEpisodes]:
    """All sets of a split, by name, in order of ways, then shots.

    Raises:
        ArtefactError: the folder or a file was altered, or has another schema version.
        TaskError: no set could be drawn for this split; says why.
    """
    manifest = verify(folder)
    names = [n for n in manifest["files"] if n.startswith(f"{split}-") and n.endswith(".arrow")]
    if not names:
        reasons = "; ".join(manifest.get("left_out", {}).values()) or "none was asked for"
        raise TaskError(f"{folder} holds no {split} episodes: {reasons}")
    sets = [_read_one(folder / name, split) for name in names]
    return {s.name: s for s in sorted(sets, key=lambda s: (s.num_ways, s.num_shots))}


def _read_one(path: Path, split: str) -> FrozenEpisodes:
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    protocol = json.loads(table.schema.metadata[b"protocol"])
    if (version := protocol.pop("schema_version")) != SCHEMA_VERSION:
        raise ArtefactError(
            f"{path} has schema version {version}, this code reads {SCHEMA_VERSION}. "
            "Make it again: `dvc repro sample_tasks`."
        )
    arrays = {name: _matrix(table.column(name)) for name in table.column_names}
    return FrozenEpisodes(
        name=setting_name(protocol["ways"], protocol["shots"]),
        split=split,
        num_ways=protocol["ways"],
        num_shots=protocol["shots"],
        num_queries=protocol["queries"],
        digest=sha256_file(path),
        protocol=protocol,
        **arrays,
    )


def _matrix(column: pa.ChunkedArray) -> Rows:
    array = column.combine_chunks()
    values: Rows = np.from_dlpack(array.flatten()).astype(np.int32, copy=False)
    return values.reshape(len(array), array.type.list_size)


def setting_name(ways: int, shots: int) -> str:
    """The field's short name of a setting: 5w1s."""
    return f"{ways}w{shots}s"
