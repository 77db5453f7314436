"""No byte of a store changes silently (D1), none is ever half there (D2), none runs code (D7)."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from io import BufferedReader
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.core.errors import ArtefactError
from pipeline.core.files import MANIFEST, read_json, seal, verify
from pipeline.store import shards
from pipeline.store.reader import Store, StoredClass, open_store
from pipeline.store.writer import StoreContent, write_store


def small_store(target: Path, *, level: int = 0, num_shards: int = 3, size: int = 16) -> None:
    """20 rows a shard; every pixel of row r is (r + level) % 256."""
    num_rows = 20 * num_shards
    splits = ("train", "val", "test")
    classes = tuple(
        StoredClass(f"class{i}", "all", splits[min(i * 3 // (num_rows // 4), 2)], 4 * i, 4)
        for i in range(num_rows // 4)
    )
    rows = ((np.arange(num_rows) + level) % 256).astype(np.uint8)
    pixels = np.broadcast_to(rows[:, None, None, None], (num_rows, 1, size, size))
    names = [f"row {row}" for row in range(num_rows)]
    content = StoreContent("test", classes, pixels, np.arange(num_rows), names)
    write_store(target, content, rows_per_shard=20, report={"level": level})


def mutate(folder: Path, rng: random.Random) -> tuple[str, set[str]]:
    """Damage one shard; return the kind and the shards of which one must be named."""
    shards = sorted(folder.glob("*.arrow"))
    shard = rng.choice(shards)
    content = bytearray(shard.read_bytes())
    kind = rng.choice(["flip", "bytes", "cut", "grow", "swap", "copy", "drop", "empty", "link"])
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        start = rng.randrange(len(content))
        fresh = bytes(b ^ rng.randrange(1, 256) for b in content[start : start + 16])
        content[start : start + 16] = fresh
    elif kind == "cut":
        del content[rng.randrange(len(content)) :]
    elif kind == "grow":
        content += rng.randbytes(rng.randrange(1, 99))
    elif kind == "empty":
        content.clear()
    if kind in ("swap", "copy"):
        other = rng.choice([s for s in shards if s != shard])
        if kind == "swap":
            shard.write_bytes(other.read_bytes())
            other.write_bytes(content)
        elif rng.random() < 0.5:
            other.write_bytes(content)
            return kind, {other.name}
        else:
            other = folder / "shard-00099.arrow"
            other.write_bytes(content)
            return kind, {other.name}
        return kind, {shard.name, other.name}
    if kind == "drop":
        shard.unlink()
    elif kind == "link":
        shard.unlink()
        (folder.parent / "outside.arrow").write_bytes(content)
        shard.symlink_to(folder.parent / "outside.arrow")
    else:
        shard.write_bytes(content)
    return kind, {shard.name}


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_mutation_of_a_shard_is_refused_by_name(tmp_path: Path, count: int) -> None:
    small_store(tmp_path / "good")
    rng = random.Random(1)
    kinds: Counter[str] = Counter()
    for _ in range(count):
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        kind, names = mutate(tmp_path / "bad", rng)
        with pytest.raises(ArtefactError) as error:
            open_store(tmp_path / "bad")
        assert any(name in str(error.value) for name in names), (kind, names, error.value)
        kinds[kind] += 1
        shutil.rmtree(tmp_path / "bad")
    assert len(kinds) == 9 and sum(kinds.values()) == count
    open_store(tmp_path / "good")


def test_without_the_manifest_flips_would_go_unnoticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard is what catches them: Arrow itself reads most flipped bits without a word."""
    small_store(tmp_path / "store")
    monkeypatch.setattr("pipeline.store.shards._check_hash", lambda expected, file: None)
    shard = tmp_path / "store" / "shard-00001.arrow"
    content = shard.read_bytes()
    silent = 0
    for offset in range(1000, 5000, 100):
        shard.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
        store = open_store(tmp_path / "store")
        pixels = store.gather(np.arange(store.num_rows))
        silent += bool((pixels != np.arange(60).reshape(60, 1, 1, 1)).any())
    assert silent > 30


def damage(path: Path, kind: str) -> None:
    """Alter a file that somebody has open, in place; or put another in its place."""
    content = bytearray(path.read_bytes())
    if kind == "cut":
        del content[len(content) // 2 :]
    elif kind in ("flip", "replace"):
        content[len(content) // 2] ^= 1
    if kind == "replace":
        path.with_name("other").write_bytes(content)
        path.with_name("other").rename(path)
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["flip", "cut"])
@pytest.mark.parametrize("when", ["before it is opened", "while it is open"])
def test_no_row_of_a_tampered_shard_is_returned_by_a_store_that_verifies_later(
    tmp_path: Path, kind: str, when: str
) -> None:
    """Not the first time nor later; and rows of the other shards are, for they are good."""
    small_store(tmp_path / "store")
    victim, good, bad = tmp_path / "store" / "shard-00001.arrow", np.r_[0:20, 40:60], np.r_[20:40]
    if when == "before it is opened":
        if kind == "cut":  # seen by its size
            damage(victim, kind)
            with pytest.raises(ArtefactError, match=r"shard-00001\.arrow has the wrong size"):
                open_store(tmp_path / "store", at_once_bytes=0)
            return
        damage(victim, kind)
    store = open_store(tmp_path / "store", at_once_bytes=0)
    if when == "while it is open":
        damage(victim, kind)
    for _ in range(2):
        for row in bad:
            for use in (store.gather, store.names):
                with pytest.raises(ArtefactError, match=r"shard-00001\.arrow was altered"):
                    use(np.array([3, row]))
        assert np.array_equal(store.gather(good)[:, 0, 0, 0], good)
    with pytest.raises(ArtefactError, match=r"shard-00001\.arrow (was altered|has the wrong size)"):
        open_store(tmp_path / "store")


def test_an_open_store_stays_what_it_was_when_another_is_put_in_its_place(tmp_path: Path) -> None:
    """Verified or not yet: its files are held open, so none of another version gets in."""
    small_store(tmp_path / "store")
    store = open_store(tmp_path / "store", at_once_bytes=0)
    first = store.gather(np.arange(20))
    small_store(tmp_path / "store", level=100)
    rows = np.arange(store.num_rows)
    assert np.array_equal(store.gather(rows)[:, 0, 0, 0], rows)
    assert np.array_equal(first[:, 0, 0, 0], rows[:20])
    assert store.digest != open_store(tmp_path / "store").digest


def test_many_threads_may_ask_for_the_first_rows(tmp_path: Path) -> None:
    small_store(tmp_path / "store", num_shards=30)
    rng, wrong = np.random.default_rng(0), []
    for _ in range(20):
        store = open_store(tmp_path / "store", at_once_bytes=0)

        def ask(store: Store, rows: np.ndarray) -> None:
            for some in np.split(rows, 50):
                if not np.array_equal(store.gather(some)[:, 0, 0, 0], some % 256):
                    wrong.append(some)

        threads = [
            threading.Thread(target=ask, args=(store, rng.permutation(600))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_shards_are_verified_when_they_are_touched_or_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_store(tmp_path / "store", num_shards=5)
    checked: list[str] = []
    real = shards._check_hash

    def note(expected: shards.ShardFile, file: BufferedReader) -> None:
        checked.append(expected.path.name)
        real(expected, file)

    monkeypatch.setattr(shards, "_check_hash", note)
    store = open_store(tmp_path / "store", at_once_bytes=0)
    assert checked == []
    store.gather(np.array([[45, 5], [46, 5]]))
    assert checked == ["shard-00000.arrow", "shard-00002.arrow"]
    store.gather(np.arange(100))
    assert sorted(checked) == [f"shard-0000{i}.arrow" for i in range(5)]
    checked.clear()
    open_store(tmp_path / "store").gather(np.arange(100))
    assert sorted(checked) == [f"shard-0000{i}.arrow" for i in range(5)]


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    small_store(tmp_path / "store")
    path = tmp_path / "store" / MANIFEST
    content = path.read_text()
    path.write_text(content.replace('"test"', '"train"'))
    with pytest.raises(ArtefactError, match="altered"):
        open_store(tmp_path / "store")


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("schema_version", 1, "version 1"),
        ("num_rows", 61, "do not agree"),
        ("rows_per_shard", 21, "do not agree"),
        ("image_shape", [1, 16, 15], "other columns|not have"),
        ("image_shape", "wide", "is not a store"),
        ("classes", {}, "is not a store"),
        ("classes", [], "is not a store"),
        ("shards", ["shard-00000.arrow"], "do not agree"),
        ("shards", ["../secret.arrow"], "is not a store"),
    ],
)
def test_a_sealed_folder_that_is_no_store_is_refused(
    tmp_path: Path, key: str, value: object, what: str
) -> None:
    small_store(tmp_path / "store")
    reseal(tmp_path / "store", **{key: value})
    with pytest.raises(ArtefactError, match=what):
        open_store(tmp_path / "store")


def reseal(folder: Path, **changes: object) -> None:
    """What somebody who can write the whole folder can do."""
    header = {**read_json(folder / MANIFEST), **changes}
    for key in ("files", "manifest_sha256"):
        header.pop(key, None)
    seal(folder, **header)


WRITER = """
import sys
from pathlib import Path
from tests.unit.test_store_integrity import small_store
level = int(sys.argv[2])
while True:
    level += 1
    small_store(Path(sys.argv[1]), level=level, num_shards=8, size=32)
    print(level, flush=True)
"""


def whole_level(folder: Path) -> int:
    """Check that the store is one whole version; return which."""
    store = open_store(folder)
    pixels = store.gather(np.arange(store.num_rows))
    level = read_json(folder / "report.json")["level"]
    assert (pixels == ((np.arange(store.num_rows) + level) % 256).reshape(-1, 1, 1, 1)).all()
    return level


@pytest.mark.parametrize("num_kills", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_a_killed_writer_leaves_a_whole_store(tmp_path: Path, num_kills: int) -> None:
    """kill -9 at random moments, most of them inside a write; readers look all the time."""
    target = tmp_path / "store" / "test"
    rng = random.Random(2)
    stop = threading.Event()
    torn: list[str] = []
    reads = 0

    def look() -> None:
        nonlocal reads
        while not stop.is_set():
            if target.exists():
                try:
                    manifest = verify(target)
                    assert len(manifest["shards"]) == 8
                    reads += 1
                except ArtefactError:  # it was replaced between two looks: never a wrong byte
                    time.sleep(0.001)
                except Exception as error:  # FileNotFoundError: the old version has just gone
                    if not isinstance(error, FileNotFoundError):
                        torn.append(repr(error))

    reader = threading.Thread(target=look)
    reader.start()
    finished = inside = 0
    progress_at_kill = []
    for _ in range(num_kills):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(target), str(finished)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert writer.stdout is not None
        last = int(writer.stdout.readline())
        time.sleep(rng.random() * 0.2)
        writer.kill()
        told = [int(line) for line in writer.communicate()[0].split()]
        last = told[-1] if told else last
        progress_at_kill.append(last - finished)
        left = [path for path in target.parent.iterdir() if path.name.startswith(".")]
        inside += bool(left)
        if target.exists():  # killed between the two renames, the new version waits beside it
            assert whole_level(target) >= last
        finished = last + 1
        for path in left:
            shutil.rmtree(path)
    stop.set()
    reader.join()
    assert not torn
    assert reads > 0
    assert all(progress > 0 for progress in progress_at_kill), progress_at_kill
    assert inside > 0, "no kill came inside a write"


class Canary(pa.ExtensionType):
    """An extension type whose decoder shows that it ran."""

    ran: list[bytes] = []  # noqa: RUF012

    def __init__(self, name: str, note: bytes = b"payload") -> None:
        self._note = note
        super().__init__(pa.uint8(), name)

    def __arrow_ext_serialize__(self) -> bytes:
        return self._note

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, note: bytes) -> Canary:
        cls.ran.append(note)
        return cls("canary", note)


@pytest.mark.parametrize(
    "name", ["canary", "ray.data.arrow_tensor", "arrow.py_extension_type", "image"]
)
def test_a_foreign_extension_type_never_runs(tmp_path: Path, name: str) -> None:
    """The control shows that opening the same file in Arrow does run its decoder."""
    small_store(tmp_path / "store")
    path = tmp_path / "store" / "shard-00000.arrow"
    batch = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).get_batch(0)
    canary = Canary(name)
    column = pa.ExtensionArray.from_storage(canary, pa.array(np.zeros(20, dtype=np.uint8)))
    batch = batch.append_column("label2", column)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    reseal(tmp_path / "store")
    pa.register_extension_type(canary)
    try:
        Canary.ran.clear()
        with pytest.raises(ArtefactError, match="shard-00000.arrow holds a column"):
            open_store(tmp_path / "store")
        assert Canary.ran == []
        pa.ipc.open_file(pa.BufferReader(path.read_bytes()))
        assert Canary.ran
    finally:
        pa.unregister_extension_type(name)


@pytest.mark.parametrize("where", ["schema", "field"])
def test_foreign_metadata_is_refused(tmp_path: Path, where: str) -> None:
    small_store(tmp_path / "store")
    path = tmp_path / "store" / "shard-00002.arrow"
    batch = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).get_batch(0)
    schema, note = batch.schema, {"ray.data.arrow_tensor": json.dumps({"x": 1})}
    if where == "schema":
        schema = schema.with_metadata(note)
    else:
        schema = schema.set(1, schema.field(1).with_metadata(note))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
    reseal(tmp_path / "store")
    with pytest.raises(ArtefactError, match=r"shard-00002\.arrow holds a column, type or metadata"):
        open_store(tmp_path / "store")


def test_a_shard_that_is_no_arrow_file_is_named(tmp_path: Path) -> None:
    small_store(tmp_path / "store")
    (tmp_path / "store" / "shard-00001.arrow").write_bytes(b"ARROW1\0\0" * 100)
    reseal(tmp_path / "store")
    with pytest.raises(ArtefactError, match=r"shard-00001\.arrow is not an Arrow file"):
        open_store(tmp_path / "store")
