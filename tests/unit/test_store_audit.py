"""Duplicates are found: planted leaks (D6), look-alike classes, and nothing that is none."""

from __future__ import annotations

import io
import itertools
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.domains.base import PHOTOGRAPHS_ALIKE
from pipeline.domains.pictures import decode_picture
from pipeline.store.audit import (
    DuplicatesConfig,
    content_hashes,
    find_look_alikes,
    find_recurring,
    views,
)
from tests.conftest import shared_data
from tests.unit.raw_pictures import encode, noise

CONFIG = DuplicatesConfig()


def stored(content: bytes) -> np.ndarray:
    return decode_picture(content, size=84, channels=3).pixels


def resized(content: bytes, factor: float) -> bytes:
    picture = Image.open(io.BytesIO(content))
    side = round(picture.width * factor)
    return encode(np.asarray(picture.convert("RGB").resize((side, side))))


def encoded_again(content: bytes, quality: int) -> bytes:
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return encode(pixels, "JPEG", quality=quality)


@pytest.fixture(scope="module")
def photographs() -> list[bytes]:
    """2,400 real photographs of 80 classes, 30 each (without the twins of one class)."""
    archive = zipfile.ZipFile(shared_data("caltech101_84") / "images.zip")
    by_class: dict[str, list[str]] = {}
    for name in sorted(archive.namelist()):
        by_class.setdefault(name.split("/")[1], []).append(name)
    for left_out in ("BACKGROUND_Google", "Faces_easy"):
        del by_class[left_out]
    return [archive.read(name) for names in list(by_class.values())[:80] for name in names[:30]]


def test_planted_leaks_are_found_and_nothing_else_is(photographs: list[bytes]) -> None:
    """50 each of copies, re-encodings, resizes and flips of training pictures in the test split."""
    half = len(photographs) // 2
    train, test = photographs[:half], photographs[half:]
    origins = np.random.default_rng(0).choice(half, 200, replace=False).reshape(4, 50)
    planted = [
        [train[i] for i in origins[0]],
        [encoded_again(train[i], 30 + k) for k, i in enumerate(origins[1])],
        [resized(train[i], 0.4 + k / 25) for k, i in enumerate(origins[2])],
    ]
    earlier = np.array([stored(content) for content in train])
    later = np.array([stored(content) for content in [*itertools.chain(*planted), *test]])
    flipped = earlier[origins[3]][..., ::-1]
    known = set(content_hashes(earlier))
    assert sum(h in known for h in content_hashes(later[:50])) == 50
    found = find_recurring(views(later), views(earlier), PHOTOGRAPHS_ALIKE)
    right = [row in found and found[row] == origins.ravel()[row] for row in range(150)]
    recall = np.array(right).reshape(3, 50).mean(axis=1)
    false_alarms = sum(row >= 150 for row in found) / len(test)
    print(f"recall of copies, re-encodings, resizes: {recall}; false alarms {false_alarms:.4f}")
    assert recall[0] == 1
    assert (recall[1:] >= 0.95).all()
    assert false_alarms <= 0.001
    mirrored = find_recurring(views(flipped[..., ::-1]), views(earlier), PHOTOGRAPHS_ALIKE)
    assert [mirrored[row] for row in range(50)] == origins[3].tolist()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), similarity=st.sampled_from([0.6, 0.9, 0.99]))
def test_the_short_cut_finds_exactly_what_a_full_comparison_finds(
    seed: int, similarity: float
) -> None:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (12, 1, 9, 9))
    mixed = base[rng.integers(0, 12, 30)] + rng.normal(0, rng.choice([5, 40, 150]), (30, 1, 9, 9))
    later = views(np.clip(mixed, 0, 255).astype(np.uint8))
    earlier = views(base.astype(np.uint8))
    exact = later.astype(np.int64) @ earlier.astype(np.int64).T >= similarity * 2**22
    found = find_recurring(later, earlier, similarity)
    assert set(found) == set(np.flatnonzero(exact.any(axis=1)).tolist())
    assert all(exact[row, double] for row, double in found.items())


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), channels=st.sampled_from([1, 3]), size=st.integers(16, 80))
def test_the_product_of_views_is_the_correlation(seed: int, channels: int, size: int) -> None:
    """Against numpy's own, after pooling by the definition."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (4, channels, size, size), dtype=np.uint8)
    step = -(-size // 32)
    pooled = [
        [
            picture.sum(axis=0, dtype=np.int64)[r : r + step, c : c + step].sum()
            for r in range(0, size, step)
            for c in range(0, size, step)
        ]
        for picture in pixels
    ]
    view = views(pixels).astype(np.float64)
    # Each value is rounded by up to a half: that much of the other's values, and of its own errors.
    rounding = (np.abs(view).sum(axis=1).max() + view.shape[1] / 4) / 2**22
    assert np.abs(view @ view.T / 2**22 - np.corrcoef(pooled)).max() <= rounding < 0.02
    assert np.array_equal(views(pixels[2:]), views(pixels)[2:])


def test_sums_of_views_are_exact_in_float32() -> None:
    """The largest partial sum is 2**22, and float32 counts to 2**24: the order cannot matter."""
    view = views(np.array([noise(seed)[..., 0][None] for seed in range(50)]))
    exact = view.astype(np.int64) @ view.astype(np.int64).T
    assert np.array_equal(view @ view.T, exact)
    assert np.abs(view).astype(np.int64).max() <= 2**11
    assert (view.astype(np.int64) ** 2).sum(axis=1).max() < 2**23


def test_flat_pictures_resemble_nothing() -> None:
    pixels = np.full((3, 1, 16, 16), 90, dtype=np.uint8)
    assert find_recurring(views(pixels), views(pixels), 0.99) == {}


def families(shared: dict[tuple[int, int], int], num_classes: int) -> np.ndarray:
    """Ten pictures a class; `shared[a, b]` of b's are a's."""
    pictures = np.array(
        [[noise(100 * c + i, 24)[..., 0][None] for i in range(10)] for c in range(num_classes)]
    )
    for (source, copy), count in shared.items():
        pictures[copy, :count] = pictures[source, :count]
    return pictures.reshape(-1, 1, 24, 24)


@pytest.mark.parametrize(
    ("shared", "dropped"),
    [
        ({}, {}),
        ({(0, 1): 2}, {}),
        ({(0, 1): 3}, {1: 0}),
        ({(0, 1): 10, (0, 2): 10}, {1: 0, 2: 0}),
        ({(0, 1): 5, (1, 2): 3}, {1: 0, 2: 0}),
        ({(2, 3): 4, (0, 5): 9}, {3: 2, 5: 0}),
    ],
)
def test_a_class_goes_if_a_quarter_of_it_is_in_a_class_that_stays(
    shared: dict[tuple[int, int], int], dropped: dict[int, int]
) -> None:
    members = [np.arange(10 * c, 10 * c + 10) for c in range(6)]
    found = find_look_alikes(views(families(shared, 6)), members, CONFIG, 0.99)
    assert {pair.dropped: pair.kept for pair in found} == dropped


def test_a_class_that_resembles_only_a_dropped_one_stays() -> None:
    pictures = families({(0, 1): 4}, 3).reshape(3, 10, 1, 24, 24)
    pictures[2, 6:] = pictures[1, 6:]  # four that class 0 does not have
    members = [np.arange(10 * c, 10 * c + 10) for c in range(3)]
    found = find_look_alikes(views(pictures.reshape(-1, 1, 24, 24)), members, CONFIG, 0.99)
    assert {pair.dropped: pair.kept for pair in found} == {1: 0}


@settings(deadline=None)
@given(sizes=st.lists(st.integers(2, 12), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_shares_match_a_plain_count(sizes: list[int], seed: int) -> None:
    """The share is over the smaller class (the first of equals), counted one by one."""
    rng = np.random.default_rng(seed)
    pool = np.array([noise(i, 16)[..., 0][None] for i in range(6)])
    view = views(pool[rng.integers(0, 6, sum(sizes))])
    ends = np.cumsum(sizes)
    members = [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    config = DuplicatesConfig(class_share=0.5)
    stays: list[int] = []
    for later in range(len(sizes)):
        if not any(plain_share(view, members[k], members[later]) >= 0.5 for k in stays):
            stays.append(later)
    found = {pair.dropped for pair in find_look_alikes(view, members, config, 0.99)}
    assert found == set(range(len(sizes))) - set(stays)


def plain_share(view: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    small, large = (first, second) if len(first) <= len(second) else (second, first)
    return sum(any(view[a] @ view[b] >= 0.99 * 2**22 for b in large) for a in small) / len(small)
