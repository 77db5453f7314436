"""Stores as a whole: the same input, the same bytes; no class twice; a hurt worker hurts no one."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config import parse_section
from pipeline.core.errors import ConfigError, DataError
from pipeline.domains.base import Drawn, Job, Plan
from pipeline.store.build import PreprocessConfig, build_store
from pipeline.store.drawing import DIED, draw_jobs
from pipeline.store.reader import Store, open_store
from tests.unit.raw_pictures import encode, noise, write_classes

NAMES = [f"class{i}" for i in range(10)]


def settings(root: Path, **changes: object) -> PreprocessConfig:
    values = {"domain": "image_folder", "source": root, "image_size": 16, "channels": 3}
    values |= {"min_examples_per_class": 3, "rows_per_shard": 7}
    return PreprocessConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    write_classes(root, NAMES)
    return root


@pytest.fixture(scope="module")
def store(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    target = tmp_path_factory.mktemp("stores") / "pictures"
    build_store(settings(raw), target, num_workers=1)
    return open_store(target)


def test_the_same_input_gives_the_same_bytes_with_any_number_of_workers(
    raw: Path, store: Store, tmp_path: Path
) -> None:
    build_store(settings(raw), tmp_path / "again", num_workers=3)
    names = sorted(p.name for p in store.folder.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "again").iterdir())
    for name in names:
        assert (store.folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_other_input_gives_another_digest(raw: Path, store: Store, tmp_path: Path) -> None:
    build_store(settings(raw, seed=1), tmp_path / "seed")
    assert open_store(tmp_path / "seed").digest != store.digest


def test_rows_are_sorted_by_split_group_and_class(store: Store) -> None:
    order = {"train": 0, "val": 1, "test": 2}
    keys = [(order[c.split], c.group, c.name) for c in store.classes]
    assert keys == sorted(keys)
    assert [c.offset for c in store.classes] == np.cumsum([0, *(c.count for c in store.classes)])[
        :-1
    ].tolist()
    assert store.num_rows == 40
    for split in order:
        assert {store.classes[i].split for i in store.class_ids(split)} == {split}
    assert sum(len(store.class_ids(split)) for split in order) == len(store.classes)


def test_a_row_holds_the_picture_that_it_names(raw: Path, store: Store) -> None:
    from pipeline.domains.pictures import decode_picture

    rows = np.arange(store.num_rows)
    for row, name, picture in zip(rows, store.names(rows), store.gather(rows), strict=True):
        expected = decode_picture((raw / name).read_bytes(), size=16, channels=3).pixels
        assert np.array_equal(picture, expected)
        assert store.classes[store.labels()[row]].name == name.split("/")[0]


def test_statistics_are_of_the_training_rows_only(store: Store) -> None:
    """Against numpy in float64 over the pictures themselves."""
    num_train = sum(c.count for c in store.classes if c.split == "train")
    training = store.gather(np.arange(num_train)).astype(np.float64) / 255
    assert store.mean == pytest.approx(training.mean(axis=(0, 2, 3)).tolist(), rel=1e-12)
    assert store.std == pytest.approx(training.std(axis=(0, 2, 3)).tolist(), rel=1e-9)
    everything = store.gather(np.arange(store.num_rows)).astype(np.float64) / 255
    assert store.mean != pytest.approx(everything.mean(axis=(0, 2, 3)).tolist(), rel=1e-6)


@given(data=st.data())
def test_gather_is_fancy_indexing_over_all_shards(store: Store, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(), (1,), (5,), (3, 4), (0,), (2, 0)]))
    size = int(np.prod(shape))
    rows = data.draw(st.lists(st.integers(0, 39), min_size=size, max_size=size))
    index = np.array(rows, dtype=np.int64).reshape(shape)
    everything = np.stack([store.gather(np.array(row)) for row in range(40)])
    assert np.array_equal(store.gather(index), everything[index])


def test_pixels_are_not_copied_from_the_map(store: Store) -> None:
    assert all(not images.flags.owndata and not images.flags.writeable for images in store._images)


def test_duplicates_are_dropped_on_the_right_side(tmp_path: Path) -> None:
    """An exact copy inside a class, one across classes, a re-encoding and a mirror across splits."""
    root = tmp_path / "raw"
    for index, split in enumerate(("train", "val", "test")):
        write_classes(root / split, [f"{split}{i}" for i in range(2)], count=8,
                      first_seed=index * 50_000)  # fmt: skip
    pixels = noise(0)
    (root / "train/train0/copy.png").write_bytes(encode(pixels))
    (root / "train/train1/copy.png").write_bytes(encode(pixels))
    (root / "val/val0/again.jpg").write_bytes(encode(pixels, "JPEG", quality=60))
    (root / "test/test0/again.jpg").write_bytes(encode(noise(50_000), "JPEG", quality=60))
    (root / "test/test1/mirror.png").write_bytes(encode(np.ascontiguousarray(pixels[:, ::-1])))
    report = build_store(settings(root), tmp_path / "store")
    dropped = {reason: entry["first"] for reason, entry in report["dropped_pictures"].items()}
    assert dropped == {
        "the same picture is in its class already": ["train0: train/train0/copy.png"],
        "the same picture is in another class": [
            "train1: train/train1/copy.png is train0: train/train0/00.png"
        ],
        "nearly the same picture is in an earlier split": [
            "val0: val/val0/again.jpg is nearly train0: train/train0/00.png",
            "test0: test/test0/again.jpg is nearly val0: val/val0/00.png",
        ],
    }
    ((reason, mirrored),) = report["notes"].items()
    assert "mirror" in reason and mirrored["count"] == 1
    assert report["kept"]["train"] == {"classes": 2, "pictures": 16, "groups": ["all"]}
    with pytest.raises(DataError, match=r"strict refuses 1 conflicts:\n  train1: .* is train0"):
        build_store(settings(root, strict=True), tmp_path / "strict")
    assert not (tmp_path / "strict").exists()


def test_a_test_class_that_looks_like_a_training_class_goes(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    for index, split in enumerate(("train", "val", "test")):
        write_classes(root / split, [f"{split}{i}" for i in range(3)], count=8,
                      first_seed=index * 50_000)  # fmt: skip
    write_classes(root / "test", ["twin"], count=8)  # the pictures of train0
    report = build_store(settings(root), tmp_path / "store")
    assert report["dropped_classes"] == {
        "looks like a class of the train split": {
            "count": 1,
            "first": ["twin (test) like train0"],
            "pictures": 8,
        }
    }
    with pytest.raises(DataError, match="class 'twin' .* looks like 'train0'"):
        build_store(settings(root, strict=True), tmp_path / "strict")


def test_the_old_store_stays_when_the_new_one_cannot_be_made(raw: Path, tmp_path: Path) -> None:
    build_store(settings(raw), tmp_path / "store")
    before = open_store(tmp_path / "store").digest
    with pytest.raises(DataError, match="min_examples_per_class"):
        build_store(settings(raw, min_examples_per_class=5), tmp_path / "store")
    assert open_store(tmp_path / "store").digest == before
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"domain": "glyf"}, "there are glyphs, image_folder, omniglot"),
        ({"channels": 2}, r"must be 1 \(grey\) or 3"),
        ({"glyphs": {"fonts": []}}, "glyphs.fonts: unknown key. Known keys: packages"),
        ({"image_size": 4}, "image_size"),
    ],
)
def test_a_wrong_setting_is_explained(changes: dict[str, object], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        parse_section(changes, PreprocessConfig, where="preprocess")


def test_progress_counts_every_picture(raw: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    class Bar:
        def advance(self, count: int = 1) -> None:
            seen.append(count)

    @contextmanager
    def progress(label: str, *, total: int, unit: str):  # type: ignore[no-untyped-def]
        seen.append(-total)
        yield Bar()

    build_store(settings(raw), tmp_path / "store", progress=progress)
    assert sum(seen) == 0 and len(seen) > 1


@dataclass(frozen=True)
class Deadly:
    """A domain whose items kill the worker, take its memory, or are drawn."""

    def plan(self) -> Plan:
        raise NotImplementedError

    def draw(self, job: Job) -> Drawn:
        for item in job.items:
            if item == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if item == "eat":
                try:
                    np.ones(4 << 30, dtype=np.uint8)
                except MemoryError:
                    continue
                raise AssertionError("nothing stopped the allocation")
        kept = tuple(i for i, item in enumerate(job.items) if item != "eat")
        return Drawn(np.zeros((len(kept), 1, 2, 2), dtype=np.uint8), kept)


def test_a_picture_that_kills_its_worker_costs_itself_alone() -> None:
    items = [["ok"] * 5, ["ok", "ok", "die", "ok"], ["ok", "eat", "ok"], ["die"], ["ok"] * 3]
    firsts = np.cumsum([0, *map(len, items)]).tolist()
    jobs = [Job("", first, tuple(part)) for first, part in zip(firsts, items, strict=False)]
    drawn, refused = [], {}
    for job, result in draw_jobs(Deadly(), jobs, num_workers=2):
        drawn += [job.first + i for i in result.kept]
        refused |= {job.first + i: reason for i, reason in result.refused.items()}
    flat = [item for part in items for item in part]
    assert sorted(drawn) == [i for i, item in enumerate(flat) if item == "ok"]
    assert refused == {i: DIED for i, item in enumerate(flat) if item == "die"}
