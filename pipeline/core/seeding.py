"""Counter-based random numbers: a draw is a pure function of (seed, stream, index, slot)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

UInts = npt.NDArray[np.uint64]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(
    counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]
) -> tuple[UInts, UInts, UInts, UInts]:
    """Philox4x32-10 on whole arrays: four 32-bit words (held in uint64) per counter.

    Args:
        counter: four words, arrays or scalars of values below 2**32 that broadcast together.
        key: two words, likewise.

    References:
        Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011, section 4.3.
    """
    a, b, c, d = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = (np.asarray(word, dtype=np.uint64) for word in key)
    for _ in range(10):
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (right >> _SHIFT) ^ b ^ k0,
            right & _LOW,
            (left >> _SHIFT) ^ d ^ k1,
            left & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return a, b, c, d


def random_words(seed: int, stream: int, indices: npt.NDArray[Any], num_words: int) -> UInts:
    """Independent 32-bit words for each index of one stream.

    Args:
        seed: any integer in [0, 2**64).
        stream: which independent stream, in [0, 2**32): training and validation never share one.
        indices: positions in the stream, any shape [...], values in [0, 2**64).

    Returns:
        Words in [0, 2**32) as uint64, shape [..., num_words]; word w of index i never depends on
        how many other indices or words were asked for.
    """
    blocks = np.arange((num_words + 3) // 4, dtype=np.uint64)
    index = np.asarray(indices, dtype=np.uint64)[..., None]
    key = (seed & 0xFFFFFFFF, seed >> 32)
    words = philox((blocks, index & _LOW, index >> _SHIFT, stream), key)
    return np.stack(words, axis=-1).reshape(*index.shape[:-1], -1)[..., :num_words]


def derive_seed(seed: int, *path: int) -> int:
    """A seed for a part of a run, such as one worker pool; independent along the path."""
    sequence = np.random.SeedSequence(seed, spawn_key=path)
    return int(sequence.generate_state(1, dtype=np.uint64)[0])
