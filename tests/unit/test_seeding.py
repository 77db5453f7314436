from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.seeding import derive_seed, philox, random_words

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    """The known answers for philox4x32-10 that come with the authors' Random123 library."""
    assert tuple(int(word) for word in philox(counter, key)) == expected


@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
    index=st.integers(0, 2**40),
    others=st.lists(st.integers(0, 2**40), max_size=5),
    words=st.integers(1, 9),
    more=st.integers(0, 9),
)
def test_a_word_depends_on_its_own_coordinates_alone(
    seed: int, stream: int, index: int, others: list[int], words: int, more: int
) -> None:
    alone = random_words(seed, stream, np.array([index]), words)[0]
    in_company = random_words(seed, stream, np.array([*others, index]), words + more)[-1]
    assert alone.tolist() == in_company[:words].tolist()


def test_streams_seeds_and_indices_differ() -> None:
    base = random_words(1, 1, np.arange(4), 4)
    for other in (random_words(2, 1, np.arange(4), 4), random_words(1, 2, np.arange(4), 4)):
        assert not np.any(base == other)
    assert len(np.unique(random_words(0, 0, np.arange(1000), 8))) > 7990


def test_words_are_uniform() -> None:
    """Counts over 16 bins against chi-square with 15 degrees of freedom (99.99 %: 44.3)."""
    words = random_words(3, 1, np.arange(20_000), 4)
    counts = np.bincount((words >> np.uint64(28)).astype(int).ravel(), minlength=16)
    assert ((counts - 5000) ** 2 / 5000).sum() < 44.3


def test_derived_seeds_differ_by_path() -> None:
    seeds = {
        derive_seed(0),
        derive_seed(1),
        derive_seed(0, 1),
        derive_seed(0, 2),
        derive_seed(0, 1, 2),
    }
    assert len(seeds) == 5
