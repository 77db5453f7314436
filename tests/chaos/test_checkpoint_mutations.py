"""A thousand spoilt checkpoints: none is loaded, the newest good one is, and it is told (F5).

What `tests/unit/test_checkpoint.py` does to one file of the newest checkpoint, this does to several,
to whole folders, and with checkpoints of other runs; one or both of those that are kept are spoilt.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from pipeline.core.errors import ArtefactError
from pipeline.core.files import MANIFEST, canonical_json, read_json, seal, sha256_bytes
from pipeline.runtime import checkpoint
from pipeline.runtime.checkpoint import load_checkpoint, save_checkpoint, tidy_checkpoints
from tests.chaos.campaign import Campaign, Try, tries

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

OLDER, NEWER = "step-00000010", "step-00000020"
Mutation = Callable[[Path, random.Random], None]
"""Spoil the checkpoint at this path."""


def _file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.iterdir()))


def flip(folder: Path, rng: random.Random) -> None:
    """Bits of one file."""
    path = _file(folder, rng)
    content = bytearray(path.read_bytes())
    for place in rng.sample(range(len(content)), rng.choice([1, 1, 2, 9])):
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(folder: Path, rng: random.Random) -> None:
    """One file ends early."""
    path = _file(folder, rng)
    os.truncate(path, rng.randrange(path.stat().st_size))


def zeros(folder: Path, rng: random.Random) -> None:
    """Files of the right size that hold nothing: what a disk without power may leave."""
    for path in rng.sample(sorted(folder.iterdir()), rng.randrange(1, 4)):
        path.write_bytes(bytes(path.stat().st_size))


def no_manifest(folder: Path, rng: random.Random) -> None:
    """It was never finished."""
    (folder / MANIFEST).unlink()


def emptied(folder: Path, rng: random.Random) -> None:
    """A folder and nothing in it."""
    for path in folder.iterdir():
        path.unlink()


def half_copied(folder: Path, rng: random.Random) -> None:
    """Some of its files, as of a copy that was broken off."""
    for path in rng.sample(sorted(folder.iterdir()), rng.randrange(1, 3)):
        path.unlink()


def mixed(folder: Path, rng: random.Random) -> None:
    """Files of the other checkpoint of the same run."""
    other = folder.with_name(OLDER if folder.name == NEWER else NEWER)
    for name in rng.sample(sorted(p.name for p in folder.iterdir()), rng.randrange(1, 3)):
        shutil.copyfile(other / name, folder / name)


def renamed(folder: Path, rng: random.Random) -> None:
    """The other checkpoint of the same run, whole, under this one's name."""
    other = folder.with_name(OLDER if folder.name == NEWER else NEWER)
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


def foreign_file(folder: Path, rng: random.Random) -> None:
    """The tensors of another run at the same step: of the same shapes and sizes."""
    source = folder.parent.with_name("another-run") / folder.name
    name = rng.choice(["tensors.safetensors", "state.json"])
    shutil.copyfile(source / name, folder / name)


def foreign(folder: Path, rng: random.Random) -> None:
    """Another run's checkpoint of the same step, whole and sealed."""
    shutil.rmtree(folder)
    shutil.copytree(folder.parent.with_name("another-run") / folder.name, folder)


def other_kind(folder: Path, rng: random.Random) -> None:
    """A sealed folder of this name that is no checkpoint."""
    manifest = read_json(folder / MANIFEST)
    (folder / "tensors.safetensors").rename(folder / "weights.safetensors")
    (folder / MANIFEST).unlink()
    seal(folder, **{k: v for k, v in manifest.items() if k not in ("files", "manifest_sha256")})


def edited(folder: Path, rng: random.Random) -> None:
    """The manifest says something else, under a hash made anew."""
    manifest = read_json(folder / MANIFEST)
    manifest.pop("manifest_sha256")
    name = rng.choice(sorted(manifest["files"]))
    what = rng.choice(["sha256", "bytes", "step", "gone"])
    if what == "sha256":
        manifest["files"][name]["sha256"] = sha256_bytes(rng.randbytes(9))
    elif what == "bytes":
        manifest["files"][name]["bytes"] -= 1
    elif what == "step":
        manifest["step"] += rng.choice([-1, 1, 100])
    else:
        del manifest["files"][name]
    own = sha256_bytes(canonical_json(manifest).encode())
    (folder / MANIFEST).write_text(canonical_json({**manifest, "manifest_sha256": own}))


def link(folder: Path, rng: random.Random) -> None:
    """One of its files lies elsewhere."""
    path = _file(folder, rng)
    outside = folder.parent.with_name(f"outside-{rng.getrandbits(40)}")
    path.rename(outside)
    path.symlink_to(outside)


MUTATIONS: Mapping[str, Mutation] = {
    f.__name__: f
    for f in (
        *(flip, truncate, zeros, no_manifest, emptied, half_copied, mixed, renamed),
        *(foreign_file, foreign, other_kind, edited, link),
    )
}


def save(folder: Path, step: int, *, scale: float = 1.0) -> None:
    tensors = {"vector": torch.full((500,), step * scale), "first": torch.arange(8.0) * scale}
    save_checkpoint(folder, step, tensors, {"step": step, "scale": scale})


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs of the same shapes and other values, each with two checkpoints."""
    for step in (10, 20):
        save(tmp_path / "clean" / "a-run", step)
        save(tmp_path / "clean" / "another-run", step, scale=3.0)
    return tmp_path


def resume(folder: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int | None, str]:
    """As a run does when it starts: the step that it goes on from, and what it says."""
    tidy_checkpoints(folder)
    saved = load_checkpoint(folder)
    said = capfd.readouterr().err
    if saved is None:
        return None, said
    step = int(saved.state["step"])
    right = saved.state["scale"] == 1.0 and bool((saved.tensors["vector"] == step).all())
    return (step if right else -1), said


def told_where(folder: Path, name: str, said: str) -> bool:
    """Whether the message names what is wrong, and where the bad one is kept; and it is there."""
    kept = re.search(rf"checkpoint not used, kept as (\S*damaged-\d+-{name}): (.{{10,}})", said)
    return kept is not None and Path(kept[1]).parent == folder and Path(kept[1]).is_dir()


def test_no_spoilt_checkpoint_is_loaded_and_the_newest_good_one_is(
    runs: Path, campaign: Callable[[str], Campaign], capfd: pytest.CaptureFixture[str]
) -> None:
    """A try's progress is the step of the checkpoint that was there to be lost."""
    record = campaign("a checkpoint truncated, flipped, foreign or unfinished")
    rng, kinds = random.Random(2), Counter[str]()
    silent = unnamed = 0
    for number in range(tries(200, 1000)):
        place = runs / "place"
        shutil.copytree(runs / "clean", place)
        kind, folder = sorted(MUTATIONS)[number % len(MUTATIONS)], place / "a-run"
        both = kind not in ("mixed", "renamed") and rng.random() < 0.3
        spoilt = [NEWER, OLDER] if both else [NEWER]
        for name in spoilt:
            MUTATIONS[kind](folder / name, rng)
        with pytest.raises(ArtefactError):
            load_checkpoint(folder)
        found, said = resume(folder, capfd)
        good = found == (None if both else 10)
        named = all(told_where(folder, name, said) for name in spoilt)
        silent += found in (20, -1)
        unnamed += not named
        kinds[kind] += 1
        record.add(Try(20, good and named, good, steps_lost=20 if both else 10))
        shutil.rmtree(place)
    record.notes |= {"kinds": dict(kinds), "silent": silent, "unnamed": unnamed}


def test_without_the_checks_the_campaign_finds_silent_ones(
    runs: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The campaign can fail: nothing but the manifest tells a flipped bit or another run's file."""
    rng, silent = random.Random(0), 0

    def trusting(folder: Path) -> dict[str, object]:
        return {**read_json(folder / MANIFEST), "run": folder.parent.name}

    monkeypatch.setattr(checkpoint, "verify", trusting)
    for number in range(20):
        place = runs / "place"
        shutil.copytree(runs / "clean", place)
        MUTATIONS[("foreign", "foreign_file")[number % 2]](place / "a-run" / NEWER, rng)
        silent += resume(place / "a-run", capfd)[0] in (20, -1)
        shutil.rmtree(place)
    assert silent == 20
