"""Ten thousand ways to damage a store: none is silent, none is a crash, the shard is named (D1).

Shards are flipped, cut, grown, zeroed, swapped, copied over each other, dropped, replaced by links
or by another store's; manifests are edited, with and without their own hash made anew. Each damaged
store is used in both ways: verified whole when it is opened, and shard by shard as rows are asked
for.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import ArtefactError
from pipeline.core.files import MANIFEST, canonical_json, read_json, sha256_bytes
from pipeline.store import shards
from pipeline.store.reader import Store, open_store
from tests.chaos.campaign import Campaign, Try, tries
from tests.unit.test_store_integrity import small_store

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

NUM_SHARDS, PER_SHARD = 3, 20
NUM_ROWS = NUM_SHARDS * PER_SHARD
Names = set[str]
Mutation = Callable[[Path, random.Random], Names]
"""Damage a store; return the files of which one must be named."""


def _pick(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.arrow")))


def _rewrite(folder: Path, rng: random.Random, change: Callable[[bytearray], None]) -> Names:
    path = _pick(folder, rng)
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    return {path.name}


def flip(folder: Path, rng: random.Random) -> Names:
    """One bit."""

    def change(content: bytearray) -> None:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)

    return _rewrite(folder, rng, change)


def burst(folder: Path, rng: random.Random) -> Names:
    """Some bytes one after another, all of them wrong."""

    def change(content: bytearray) -> None:
        start = rng.randrange(len(content))
        stop = start + rng.randrange(1, 64)
        content[start:stop] = bytes(b ^ rng.randrange(1, 256) for b in content[start:stop])

    return _rewrite(folder, rng, change)


def cut(folder: Path, rng: random.Random) -> Names:
    """The end is missing, perhaps all."""

    def change(content: bytearray) -> None:
        del content[rng.randrange(len(content)) :]

    return _rewrite(folder, rng, change)


def grow(folder: Path, rng: random.Random) -> Names:
    """Something was added."""
    return _rewrite(
        folder, rng, lambda content: content.extend(rng.randbytes(rng.randrange(1, 99)))
    )


def zero(folder: Path, rng: random.Random) -> Names:
    """A block of zeros, as after a power cut; its size stays."""

    def change(content: bytearray) -> None:
        start = rng.randrange(0, len(content), 512)
        block = content[start : start + 512]
        fill = bytes(len(block)) if any(block) else b"\1" * len(block)
        content[start : start + 512] = fill

    return _rewrite(folder, rng, change)


def rotate(folder: Path, rng: random.Random) -> Names:
    """The same bytes in another order: no sum of them would tell."""

    def change(content: bytearray) -> None:
        before, step = bytes(content), rng.randrange(1, len(content))
        content[:] = before[step:] + before[:step]

    return _rewrite(folder, rng, change)


def swap(folder: Path, rng: random.Random) -> Names:
    """Two shards have changed their names."""
    one, two = rng.sample(sorted(folder.glob("*.arrow")), 2)
    spare = folder.parent / "spare"
    one.rename(spare)
    two.rename(one)
    spare.rename(two)
    return {one.name, two.name}


def duplicate(folder: Path, rng: random.Random) -> Names:
    """A shard lies in another one's place, or once more under a new name."""
    one, two = rng.sample(sorted(folder.glob("*.arrow")), 2)
    target = two if rng.random() < 0.5 else folder / f"shard-{NUM_SHARDS:05d}.arrow"
    shutil.copyfile(one, target)
    return {target.name}


def drop(folder: Path, rng: random.Random) -> Names:
    """A shard is gone."""
    path = _pick(folder, rng)
    path.unlink()
    return {path.name}


def link(folder: Path, rng: random.Random) -> Names:
    """A shard is a link to itself elsewhere: what it leads to may change."""
    path = _pick(folder, rng)
    path.rename(folder.parent / "outside")
    path.symlink_to(folder.parent / "outside")
    return {path.name}


def foreign(folder: Path, rng: random.Random) -> Names:
    """A good shard of another store, of the same shape and size."""
    path = _pick(folder, rng)
    shutil.copyfile(folder.parent / "other" / path.name, path)
    return {path.name}


def edit_byte(folder: Path, rng: random.Random) -> Names:
    """One bit of the manifest, in its white space too."""
    path = folder / MANIFEST
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return {MANIFEST}


def edit_entry(folder: Path, rng: random.Random) -> Names:
    """A shard's hash or size in the manifest, which was sealed anew by somebody who can."""
    manifest = read_json(folder / MANIFEST)
    name = rng.choice(manifest["shards"])
    if rng.random() < 0.5:
        manifest["files"][name]["bytes"] += rng.choice([-1, 1, 4096])
    else:
        manifest["files"][name]["sha256"] = sha256_bytes(rng.randbytes(8))
    _reseal(folder, manifest)
    return {name}


def edit_order(folder: Path, rng: random.Random) -> Names:
    """The manifest names the shards in another order, once too often, or not all."""
    manifest = read_json(folder / MANIFEST)
    names = manifest["shards"]
    one, two = rng.sample(range(NUM_SHARDS), 2)
    what = rng.choice(["swap", "twice", "less"])
    if what == "swap":
        names[one], names[two] = names[two], names[one]
    elif what == "twice":
        names[one] = names[two]
    else:
        del names[one]
    _reseal(folder, manifest)
    return {"shard-", "manifest"}


def edit_classes(folder: Path, rng: random.Random) -> Names:
    """The manifest's classes no longer are the rows' labels."""
    manifest = read_json(folder / MANIFEST)
    classes = manifest["classes"]
    place = rng.randrange(len(classes["count"]) - 1)
    what = rng.choice(["longer", "split", "rows", "gone"])
    if what == "longer":  # still adds up, and yet rows change their class
        classes["count"][place] += 1
        classes["count"][place + 1] -= 1
    elif what == "split":
        classes["split"][place] = rng.choice(["training", "", None, 3])
    elif what == "rows":
        manifest["num_rows"] += rng.choice([-1, 1, -NUM_ROWS, 10**9])
    else:
        del classes[rng.choice(sorted(classes))][place]
    _reseal(folder, manifest)
    return {"shard-", "manifest", "is not a store"}


def _reseal(folder: Path, manifest: dict[str, Any]) -> None:
    manifest.pop("manifest_sha256")
    own = sha256_bytes(canonical_json(manifest).encode())
    text = canonical_json({**manifest, "manifest_sha256": own})
    (folder / MANIFEST).write_text(text, encoding="utf-8")


MUTATIONS: Mapping[str, Mutation] = {
    f.__name__: f
    for f in (
        *(flip, burst, cut, grow, zero, rotate, swap, duplicate, drop, link, foreign),
        *(edit_byte, edit_entry, edit_order, edit_classes),
    )
}


def read_all(folder: Path, *, later: bool) -> Store:
    """Open a store and use every row of it."""
    store = open_store(folder, at_once_bytes=0) if later else open_store(folder)
    rows = np.arange(store.num_rows)
    if later:
        for part in np.array_split(rows, 7):
            store.gather(part)
    assert np.array_equal(store.gather(rows)[:, 0, 0, 0], rows % 256), "silent"
    return store


def outcome(folder: Path, names: Names, *, later: bool) -> str:
    """refused, unnamed, silent, or the crash's name."""
    try:
        read_all(folder, later=later)
    except ArtefactError as error:
        return "refused" if any(name in str(error) for name in names) else f"unnamed: {error}"
    except AssertionError:
        return "silent"
    except Exception as error:
        return f"crash: {error!r}"
    return "silent"


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    """A good store, and another of the same shape that holds other pictures."""
    small_store(tmp_path / "good", num_shards=NUM_SHARDS)
    small_store(tmp_path / "other", num_shards=NUM_SHARDS, level=90)
    return tmp_path


def damaged(stores: Path, kind: str, rng: random.Random) -> tuple[Path, Names]:
    """A copy of the good store with this damage; its shards are copies, not links."""
    folder = stores / "bad"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(stores / "good", folder)
    return folder, MUTATIONS[kind](folder, rng)


def test_no_mutation_is_silent_or_a_crash(
    stores: Path, campaign: Callable[[str], Campaign]
) -> None:
    """A try's progress is how many bytes differ: a mutation that changes none proves nothing."""
    record = campaign("a store's shards or manifest altered")
    clean = _snapshot(stores / "good")
    rng, kinds, odd = random.Random(11), Counter[str](), Counter[str]()
    for number in range(tries(1000, 10_000)):
        kind = sorted(MUTATIONS)[number % len(MUTATIONS)]
        folder, names = damaged(stores, kind, rng)
        found = outcome(folder, names, later=number // len(MUTATIONS) % 2 == 1)
        kinds[kind] += 1
        if found != "refused":
            odd[f"{kind}: {found}"] += 1
        record.add(Try(_difference(clean, _snapshot(folder)), found == "refused"))
    record.notes |= {
        "kinds": dict(kinds),
        "silent": sum(n for k, n in odd.items() if "silent" in k),
    }
    record.notes["crashes"] = sum(n for k, n in odd.items() if "crash" in k)
    assert not odd, json.dumps(odd, indent=1)
    for later in (False, True):
        read_all(stores / "good", later=later)


def _snapshot(folder: Path) -> dict[str, bytes]:
    """Content by name; a link counts as a file that says so."""
    return {p.name: b"link" if p.is_symlink() else p.read_bytes() for p in sorted(folder.iterdir())}


def _difference(one: dict[str, bytes], two: dict[str, bytes]) -> int:
    total = 0
    for name in one.keys() | two.keys():
        a, b = (np.frombuffer(x.get(name, b""), np.uint8) for x in (one, two))
        shared = min(len(a), len(b))
        total += abs(len(a) - len(b)) + int((a[:shared] != b[:shared]).sum())
    return total


def test_without_the_hashes_the_campaign_finds_silent_damage(
    stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The campaign can fail: with the verification off, most flipped pictures come back."""
    monkeypatch.setattr(shards, "_check_hash", lambda expected, file: None)
    rng, found = random.Random(5), Counter[str]()
    for number in range(60):
        folder, names = damaged(stores, ("flip", "foreign", "zero")[number % 3], rng)
        found[outcome(folder, names, later=number % 2 == 1).partition(":")[0]] += 1
    assert found["silent"] > 20, found


def test_a_file_cut_while_the_store_is_open_is_an_error_and_no_signal(stores: Path) -> None:
    """Before its first row is used: behind that, a shortened file is a dead process (mmap)."""
    store = open_store(stores / "good", at_once_bytes=0)
    os.truncate(stores / "good" / "shard-00002.arrow", 100)
    with pytest.raises(ArtefactError, match=r"shard-00002\.arrow was altered"):
        store.gather(np.arange(NUM_ROWS))
    assert np.array_equal(store.gather(np.arange(5))[:, 0, 0, 0], np.arange(5))
