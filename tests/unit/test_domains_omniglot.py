"""Omniglot: splits, lists and rotations, on characters drawn here and on the real archives."""

from __future__ import annotations

import io
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.core.config import parse_section
from pipeline.core.errors import ConfigError, DataError
from pipeline.domains.base import Frame, Plan
from pipeline.domains.omniglot import Omniglot, OmniglotConfig
from tests.conftest import shared_data

ALPHABETS = {"images_background": "ABCDEF", "images_evaluation": "XY"}


def drawing(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 2, (105, 105), dtype=np.uint8) * 255).convert("1")


@pytest.fixture(params=["folders", "zips"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Eight alphabets of three characters of four drawings each."""
    seed = 0
    for part, alphabets in ALPHABETS.items():
        files = {}
        for alphabet in alphabets:
            for character in (1, 2, 3):
                for drawer in range(4):
                    buffer = io.BytesIO()
                    drawing(seed).save(buffer, "PNG")
                    name = f"{part}/{alphabet}/character{character:02d}/{seed:04d}_{drawer:02d}.png"
                    files[name] = buffer.getvalue()
                    seed += 1
        if request.param == "zips":
            with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
        else:
            for name, content in files.items():
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_bytes(content)
    return tmp_path


def domain(source: Path, minimum: int = 4, size: int = 35, **config: object) -> Omniglot:
    frame = Frame(source, image_size=size, channels=1, min_examples=minimum, seed=0)
    return Omniglot(OmniglotConfig(**config), frame)


def classes(plan: Plan) -> dict[str, str]:
    return {e.class_name: e.split for e in plan.examples}


def test_lakes_split_holds_out_whole_alphabets(source: Path) -> None:
    plan = domain(source, num_val_alphabets=2).plan()
    groups = {split: {e.group for e in plan.examples if e.split == split} for split in
              ("train", "val", "test")}  # fmt: skip
    assert groups["test"] == set("XY")
    assert len(groups["val"]) == 2
    assert groups["train"] | groups["val"] == set("ABCDEF")
    assert not groups["train"] & groups["val"]


@pytest.mark.parametrize(
    ("rotations", "turns"),
    [("none", (1, 1, 1)), ("train_only", (4, 1, 1)), ("all", (4, 4, 4))],
)
def test_rotations_are_classes_where_the_rule_says(
    source: Path, rotations: str, turns: tuple[int, ...]
) -> None:
    plan = domain(source, num_val_alphabets=2, rotations=rotations).plan()
    counted = Counter(classes(plan).values())
    per_split = dict(zip(("train", "val", "test"), (12, 6, 6), strict=True))
    assert counted == {s: n * t for (s, n), t in zip(per_split.items(), turns, strict=True)}


def test_a_rotation_turns_the_picture(source: Path) -> None:
    turned = domain(source, rotations="all")
    plan = turned.plan()
    job = plan.jobs[0]
    pixels = turned.draw(job).pixels
    first = {item.partition(":")[2]: pixels[i, 0] for i, item in enumerate(job.items)
             if item.startswith("000")}  # fmt: skip
    for index, item in enumerate(job.items):
        rotation, _, name = item.partition(":")
        assert np.array_equal(pixels[index, 0], np.rot90(first[name], int(rotation) // 90))


def test_paper_is_white_and_ink_is_dark(source: Path) -> None:
    """At full size a stored drawing is the file's."""
    whole = domain(source, size=105)
    job = whole.plan().jobs[0]
    assert set(np.unique(whole.draw(job).pixels)) == {0, 255}


def write_lists(folder: Path, **lists: list[str]) -> Path:
    folder.mkdir()
    for split in ("train", "val", "test"):
        (folder / f"{split}.txt").write_text("\n".join(lists.get(split, [])))
    return folder


def test_lists_decide_by_character(source: Path) -> None:
    lists = write_lists(
        source / "lists",
        train=["A/character01/rot000", "A/character01/rot090", "X/character01"],
        val=["A/character02/rot000"],
        test=["A/character03/rot000", "A/character03/rot270"],
    )
    plan = domain(source, split_dir=lists.name, rotations="train_only").plan()
    assert classes(plan) == {
        "A/character01/rot000": "train",
        "A/character01/rot090": "train",
        **{f"X/character01/rot{r}": "train" for r in ("000", "090", "180", "270")},
        "A/character02/rot000": "val",
        "A/character03/rot000": "test",
    }
    assert len(plan.dropped_classes["in no split list"]) == 20


@pytest.mark.parametrize(
    ("lists", "what"),
    [
        ({"train": ["A/character01"], "test": ["A/character01/rot090"]}, "is in two splits"),
        ({"train": ["Q/character01"]}, "characters that .* does not hold"),
        ({"train": ["A/character01/rot045"]}, "line 1: .* is not of the form"),
        ({"train": ["../character01/x"]}, "line 1"),
    ],
)
def test_bad_lists_are_refused(source: Path, lists: dict[str, list[str]], what: str) -> None:
    folder = write_lists(source / "lists", **lists)
    with pytest.raises(DataError, match=what):
        domain(source, split_dir=folder.name, rotations="all").plan()


@pytest.mark.parametrize("split_dir", ["/lists", "../lists", "a/../../lists"])
def test_lists_outside_the_source_are_refused(split_dir: str) -> None:
    values = {"split_dir": split_dir}
    with pytest.raises(ConfigError, match=r"split_dir: .* inside preprocess\.source, relative to"):
        parse_section(values, OmniglotConfig, where="params.yaml: preprocess.omniglot")


def test_missing_lists_are_looked_for_in_the_source(source: Path) -> None:
    with pytest.raises(DataError, match=re.escape(f"{source}/a/lists/train.txt is missing")):
        domain(source, split_dir="a/lists").plan()


def test_missing_archives_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither images_background/ nor images_background\.zip"):
        domain(tmp_path).plan()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"train": 964, "test": 659}),
        ({"lists": True, "rotations": "all"}, {"train": 4112, "val": 688, "test": 1692}),
        ({"lists": True}, {"train": 1028, "val": 172, "test": 423}),
    ],
)
def test_the_real_archives_hold_what_the_papers_say(
    config: dict[str, object], expected: dict[str, int]
) -> None:
    """Lake: 964 background and 659 evaluation characters; Vinyals: 1028, 172, 423, times four."""
    omniglot = shared_data("omniglot")
    options = {key: value for key, value in config.items() if key != "lists"}
    if "lists" in config:
        options["split_dir"] = "splits_vinyals"
    plan = domain(omniglot, minimum=20, **options).plan()
    counted = Counter(classes(plan).values())
    if not config:
        counted["train"] += counted.pop("val")
    assert counted == expected
    assert len(plan.examples) == 20 * sum(expected.values())


def test_real_drawings_are_dark_on_white_and_differ() -> None:
    real = domain(shared_data("omniglot"), minimum=20, size=28)
    pixels = real.draw(real.plan().jobs[0]).pixels
    assert np.median(pixels) == 255
    assert (pixels.reshape(len(pixels), -1).min(axis=1) < 200).all()
    assert len({picture.tobytes() for picture in pixels}) == len(pixels)
