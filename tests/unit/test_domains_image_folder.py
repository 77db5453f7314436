"""Anybody's pictures: layouts, lists, and files that are not what they should be."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.domains.base import Example, Frame, Plan
from pipeline.domains.image_folder import ImageFolder, ImageFolderConfig
from pipeline.domains.planning import Found, fill_splits
from pipeline.store.build import PreprocessConfig, build_store
from pipeline.store.reader import open_store
from tests.conftest import shared_data
from tests.unit.raw_pictures import encode, noise, write_classes

NAMES = [f"class{i}" for i in range(10)]


def plan(root: Path, minimum: int = 2, **config: object) -> Plan:
    frame = Frame(root, image_size=16, channels=3, min_examples=minimum, seed=0)
    return ImageFolder(ImageFolderConfig(**config), frame).plan()


def splits(found: Plan) -> dict[str, str]:
    return {example.class_name: example.split for example in found.examples}


def settings(root: Path, **changes: object) -> PreprocessConfig:
    values = {"domain": "image_folder", "source": root, "image_size": 16, "channels": 3}
    return PreprocessConfig(**{**values, "min_examples_per_class": 3, **changes})


@pytest.mark.parametrize("around", ["", "pictures/", "a/b/"])
def test_a_folder_for_each_class_is_split_by_class(tmp_path: Path, around: str) -> None:
    write_classes(tmp_path / around, NAMES)
    found = plan(tmp_path)
    assert len(found.examples) == 40
    by_split = list(splits(found).values())
    assert [by_split.count(s) for s in ("train", "val", "test")] == [6, 2, 2]  # 16 % and 20 % of 10
    assert found.facts["layout"] == "class folders"


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_split_folders_are_followed(tmp_path: Path, validation: str) -> None:
    wanted = {"train": NAMES[:6], validation: NAMES[6:8], "test": NAMES[8:]}
    for index, (split, names) in enumerate(wanted.items()):
        write_classes(tmp_path / split, names, first_seed=index * 50_000)
    found = splits(plan(tmp_path))
    assert {name for name, split in found.items() if split == "val"} == set(NAMES[6:8])
    assert {name for name, split in found.items() if split == "test"} == set(NAMES[8:])


def test_a_missing_split_is_taken_from_the_training_classes(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", NAMES[:7])
    write_classes(tmp_path / "test", NAMES[7:], first_seed=50_000)
    found = splits(plan(tmp_path))
    assert {name for name, split in found.items() if split == "test"} == set(NAMES[7:])
    assert sum(split == "val" for split in found.values()) == 2


def test_a_class_in_two_splits_stays_in_the_first_and_strict_refuses_it(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", NAMES[:7])
    write_classes(tmp_path / "test", NAMES[6:], first_seed=50_000)
    found = plan(tmp_path)
    assert splits(found)["class6"] in ("train", "val")
    assert len(found.dropped["its class is in an earlier split"]) == 4
    with pytest.raises(DataError, match=r"class 'class6' is in several splits"):
        build_store(settings(tmp_path, strict=True), tmp_path / "store")


def test_a_source_split_by_pictures_is_refused_with_advice(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_classes(tmp_path / split, NAMES)
    with pytest.raises(DataError, match=r"in test: .*Move classes, not pictures"):
        plan(tmp_path)


@pytest.mark.parametrize("folder", ["", "images/"])
@pytest.mark.parametrize("one_list", [True, False])
def test_lists_beside_a_folder(tmp_path: Path, folder: str, one_list: bool) -> None:
    write_classes(tmp_path / folder / "pool", ["p"], count=30)
    rows: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for index in range(30):
        split = ("train", "val", "test")[index // 10]
        rows[split].append(f"pool/p/{index:02d}.png,kind {index // 5},group {index // 10},{split}")
    header = "filename,label,group,split\n"
    if one_list:
        everything = [row for part in rows.values() for row in part]
        (tmp_path / "list.csv").write_text("\ufeff" + header + "\n".join(everything), "utf-8")
    else:
        for split, part in rows.items():
            (tmp_path / f"{split}.csv").write_text(header + "\n".join(part))
    found = plan(tmp_path)
    assert splits(found) == {f"kind {i}": ("train", "val", "test")[i // 2] for i in range(6)}
    assert {e.group for e in found.examples if e.split == "val"} == {"group 1"}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"filename,label\nonly\n", "too few columns"),
        (b"filename,label\n\xff\xfe,b\n", "not a CSV file in UTF-8"),
        (b'filename,label\n"a,b\n', "not a CSV file"),
        (b"filename,label,split\na,b,practice\n", "split 'practice' is none of"),
        (b"filename,label,group\na,b,1\nc,b,2\n", "in group '2' here and in '1' before"),
    ],
)
def test_a_bad_list_is_named_with_its_line(tmp_path: Path, content: bytes, what: str) -> None:
    write_classes(tmp_path, NAMES)
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(DataError, match=what):
        plan(tmp_path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"name,label\na,b\n", "list.csv has no column filename"),
        (b"filename,kind\na,b\n", "list.csv has no column label"),
        (b"", "no column filename and no column label"),
    ],
)
def test_a_csv_alone_must_be_a_list(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(DataError, match=what):
        plan(tmp_path)


STRAY = "CSV without the columns filename and label"


@pytest.mark.parametrize("content", [b"name,label\na,b\n", b"", b"\xff\xfe,b\n", b'"a\n'])
@pytest.mark.parametrize(("around", "beside"), [("", ""), ("pictures/", "pictures/"), ("a/", "")])
def test_a_stray_csv_beside_class_folders_is_reported_and_changes_nothing(
    tmp_path: Path, content: bytes, around: str, beside: str
) -> None:
    write_classes(tmp_path / around, NAMES)
    without = plan(tmp_path)
    for name in ("notes.csv", "Sizes.CSV"):
        (tmp_path / beside / name).write_bytes(content)
    found = plan(tmp_path)
    assert (found.examples, found.jobs) == (without.examples, without.jobs)
    assert found.dropped == {STRAY: (f"{beside}Sizes.CSV", f"{beside}notes.csv")}


def test_a_stray_csv_does_not_hide_the_list(tmp_path: Path) -> None:
    write_classes(tmp_path, NAMES)
    rows = [f"{name}/{i:02d}.png,kind {name}" for name in NAMES for i in range(4)]
    (tmp_path / "list.csv").write_text("filename,label\n" + "\n".join(rows))
    (tmp_path / "sizes.csv").write_text("filename,width\na,1\n")
    found = plan(tmp_path)
    assert set(splits(found)) == {f"kind {name}" for name in NAMES}
    assert found.dropped == {STRAY: ("sizes.csv",)}


def test_a_csv_named_after_a_split_is_meant_as_a_list(tmp_path: Path) -> None:
    """Ignoring it could put test pictures into training."""
    write_classes(tmp_path, NAMES)
    (tmp_path / "test.csv").write_text("image,label\na,b\n")
    with pytest.raises(DataError, match=r"test\.csv has no column filename"):
        plan(tmp_path)


def test_a_list_cannot_lead_out_of_the_source(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_classes(root, NAMES)
    (tmp_path / "secret.png").write_bytes(encode(noise(1)))
    rows = [f"{name}/{i:02d}.png,{name}" for name in NAMES for i in range(4)]
    rows += ["../secret.png,class0", f"{tmp_path}/secret.png,class0", "absent.png,class0"]
    (root / "list.csv").write_text("filename,label\n" + "\n".join(rows))
    found = plan(root)
    assert len(found.examples) == 40
    assert len(found.dropped["outside the source"]) == 2
    assert found.dropped["listed, but not there"] == ("absent.png",)


def test_excluded_classes_must_exist(tmp_path: Path) -> None:
    write_classes(tmp_path, NAMES)
    assert "class3" not in splits(plan(tmp_path, exclude=("class3",)))
    with pytest.raises(DataError, match=r"exclude names \['clas3'\]"):
        plan(tmp_path, exclude=("clas3",))


def test_no_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no pictures in class folders"):
        plan(tmp_path)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_too_few_classes_are_counted(tmp_path: Path, count: int) -> None:
    write_classes(tmp_path, NAMES[:count])
    write_classes(tmp_path, NAMES[count:], count=1)
    told = (
        rf"^{count} usable classes were found .*, and 6 are needed: .*no classes for test and val"
    )
    with pytest.raises(DataError, match=told):
        plan(tmp_path)


def found_in(**classes: int) -> list[Found]:
    """A made-up source with one picture of each class."""
    return [
        Found(Example(f"{split} {i}", "all", split, "0.png"), "raw", f"{split}/{i}/0.png")  # type: ignore[arg-type]
        for split, count in classes.items()
        for i in range(count)
    ]


@given(
    num_classes=st.integers(6, 200),
    val_share=st.floats(0.01, 0.3),
    test_share=st.floats(0.01, 0.3),
    seed=st.integers(0, 2**31),
)
def test_each_split_has_enough_classes_to_tell_apart(
    num_classes: int, val_share: float, test_share: float, seed: int
) -> None:
    """max(least, round(share n)) held out; least = 5 from 15 classes on, else 2."""
    shares = {"val_share": val_share, "test_share": test_share}
    whole = found_in(train=num_classes)
    split = fill_splits(whole, seed=seed, **shares)
    counts = Counter(f.example.split for f in split)
    least = 5 if num_classes >= 15 else 2
    assert counts["val"] == max(least, round(val_share * num_classes))
    assert counts["test"] == max(least, round(test_share * num_classes))
    assert counts["train"] == num_classes - counts["val"] - counts["test"] >= least
    again = fill_splits(whole[::-1], seed=seed, **shares)
    assert {(f.item, f.example.split) for f in again} == {(f.item, f.example.split) for f in split}


@pytest.mark.parametrize(("num_training", "num_val"), [(4, 2), (9, 2), (10, 5), (50, 6)])
def test_a_single_missing_split_has_enough_too(num_training: int, num_val: int) -> None:
    split = fill_splits(
        found_in(train=num_training, test=10), val_share=0.1, test_share=0.2, seed=0
    )
    counts = Counter(f.example.split for f in split)
    assert counts == {"train": num_training - num_val, "val": num_val, "test": 10}


def test_shares_that_leave_no_training_classes_are_refused() -> None:
    with pytest.raises(DataError, match=r"14 for test and 5 for val of 20 .* fewer than 5"):
        fill_splits(found_in(train=20), val_share=0.2, test_share=0.7, seed=0)


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent is neither a folder nor a zip"):
        plan(tmp_path / "absent")


def spoil(root: Path) -> None:
    """Put one of each kind of bad input into class0."""
    folder = root / "class0"
    whole = encode(noise(900))
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not a picture")
    (folder / ".hidden.png").write_bytes(whole)
    (folder / "big.png").write_bytes(encode(np.zeros((2001, 2000), dtype=np.uint8)))
    frames = [Image.fromarray(noise(910 + i)) for i in range(2)]
    frames[0].save(folder / "moving.png", save_all=True, append_images=frames[1:])
    (root.parent / "outside.png").write_bytes(encode(noise(920)))
    (folder / "link.png").symlink_to(root.parent / "outside.png")
    (folder / "broken.png").symlink_to(root / "nowhere.png")
    (root / "class-link").symlink_to(root.parent)
    os.mkfifo(folder / "pipe.png")
    (root / "empty").mkdir()
    write_classes(root, ["few"], count=2, first_seed=70_000)
    (root / "stray.png").write_bytes(whole)
    (folder / "copy.png").write_bytes((folder / "00.png").read_bytes())
    shades = (noise(930)[..., 0].astype(np.uint16) << 8) + 3
    Image.fromarray(shades).save(folder / "deep.png")
    Image.fromarray(noise(931)).convert("CMYK").save(folder / "print.jpg")
    Image.fromarray(np.dstack([noise(932), noise(933)[..., 0]])).save(folder / "clear.png")
    for index, name in enumerate([b"-rf.png", b"new\nline.png", b"not\xffutf8.png"]):
        (Path(os.fsdecode(os.fsencode(folder) + b"/" + name))).write_bytes(
            encode(noise(940 + index))
        )


def test_bad_input_is_dropped_or_converted_and_counted(tmp_path: Path) -> None:
    """Each of the files that `spoil` writes is accounted for, and nothing else is."""
    root = tmp_path / "raw"
    write_classes(root, NAMES)
    spoil(root)
    report = build_store(settings(root), tmp_path / "store")
    counts = {reason: entry["count"] for reason, entry in report["dropped_pictures"].items()}
    assert counts == {
        "damaged or cut short": 1,
        "the file is empty": 1,
        "neither PNG nor JPEG": 1,
        "hidden file": 1,
        "more than 4 million pixels or 4096 a side": 1,
        "animated": 1,
        "link out of the source": 1,
        "broken link": 1,
        "link to a folder": 1,
        "not a plain file": 1,
        "not in a class folder": 1,
        "the same picture is in its class already": 1,
    }
    classes = {reason: entry["first"] for reason, entry in report["dropped_classes"].items()}
    assert classes == {"no pictures": ["empty"], "fewer examples than the minimum": ["few"]}
    converted = {reason: entry["count"] for reason, entry in report["converted_pictures"].items()}
    assert converted == {
        "16 bits to 8": 1,
        "CMYK to RGB": 1,
        "transparency over white": 1,
        "odd file name": 3,
    }
    assert report["dropped_pictures"]["damaged or cut short"]["first"] == ["class0: class0/cut.png"]
    store = open_store(tmp_path / "store")
    ((zero,),) = [[c for c in store.classes if c.name == "class0"]]
    names = set(store.names(np.arange(zero.offset, zero.offset + zero.count)))
    assert {"class0/-rf.png", "class0/new\\nline.png", "class0/not\\xffutf8.png"} <= names
    assert zero.count == 4 + 3 + 3


def test_a_zip_gives_the_store_of_its_folder(tmp_path: Path) -> None:
    write_classes(tmp_path / "raw", NAMES)
    shutil.make_archive(str(tmp_path / "raw"), "zip", tmp_path / "raw")
    for source, name in (("raw", "a"), ("raw.zip", "b")):
        build_store(settings(tmp_path / source), tmp_path / name)
    first, second = open_store(tmp_path / "a"), open_store(tmp_path / "b")
    assert first.digest == second.digest


def put_into_zip(folder: Path, target: Path) -> None:
    made = shutil.make_archive(str(target.with_suffix("")), "zip", folder)
    assert Path(made) == target


def test_a_folder_around_one_zip_is_read_as_that_zip(tmp_path: Path) -> None:
    write_classes(tmp_path / "raw", NAMES)
    around = tmp_path / "around"
    around.mkdir()
    put_into_zip(tmp_path / "raw", around / "images.zip")
    (around / "LICENSE").write_text("yours")
    (around / "sizes.csv").write_text("image,width\na,1\n")
    report = build_store(settings(around), tmp_path / "a")
    build_store(settings(tmp_path / "raw"), tmp_path / "b")
    assert open_store(tmp_path / "a").digest == open_store(tmp_path / "b").digest
    assert plan(around).facts == {"layout": "class folders", "read_from": "images.zip"}
    assert report["dropped_pictures"]["beside the zip that was read"]["first"] == [
        "LICENSE",
        "sizes.csv",
    ]


def test_a_zip_beside_pictures_is_not_read(tmp_path: Path) -> None:
    write_classes(tmp_path / "raw", NAMES)
    put_into_zip(tmp_path / "raw", tmp_path / "raw/class0/more.zip")
    found = plan(tmp_path / "raw")
    assert {Path(job.source).name for job in found.jobs} == {"raw"}


def test_several_zips_are_named_and_so_is_a_list_beside_one(tmp_path: Path) -> None:
    write_classes(tmp_path / "raw", NAMES)
    for name in ("one.zip", "two.zip"):
        (tmp_path / "around").mkdir(exist_ok=True)
        put_into_zip(tmp_path / "raw", tmp_path / "around" / name)
    with pytest.raises(DataError, match=r"2 zips: one\.zip, two\.zip\. Set preprocess\.source"):
        plan(tmp_path / "around")
    (tmp_path / "around" / "two.zip").unlink()
    (tmp_path / "around" / "list.csv").write_text("filename,label\nclass0/00.png,a\n")
    with pytest.raises(DataError, match=r"the list list\.csv beside the zip one\.zip"):
        plan(tmp_path / "around")


def test_the_shared_photographs_are_read_from_their_zip() -> None:
    found = plan(shared_data("caltech101_84"), minimum=20)
    assert found.facts["read_from"] == "images.zip"
    assert len(splits(found)) > 90
