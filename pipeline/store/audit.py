"""Duplicates: pictures that are there twice, and classes that cannot be told apart.

Everything works on *views*: the channels' sum, pooled to at most 32x32, with mean 0 and length
2**11, rounded to whole numbers. The product of two views is then (2**22 times) the correlation of
two pictures, and it is exact in float32 - no partial sum reaches 2**24 - so that what counts as a
duplicate hangs neither on the number of threads nor on the machine. N pictures, D view values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field, PositiveInt

from pipeline.core.config import Section
from pipeline.core.files import sha256_bytes

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
_VIEW_SIDE = 32
_LENGTH = 2.0**11
_BLOCK = 512
_SAMPLE = 256
_NUM_DIRECTIONS = 32


class DuplicatesConfig(Section):
    """When pictures, and classes, are too alike."""

    similarity: float | None = Field(default=None, gt=0.5, le=1)
    """Correlation of two pictures (at 32x32 or less) from which they count as the same; null: the
    domain's own, 0.98 for photographs and 0.99 for drawn characters."""
    class_share: float = Field(default=0.25, gt=0, le=1)
    """Classes are look-alikes if this share of the smaller one's pictures recurs in the other."""
    num_neighbours: PositiveInt = 16
    """Classes of nearest mean that each class is compared with."""


@dataclass(frozen=True)
class LookAlike:
    """Class `dropped` cannot be told from class `kept`."""

    dropped: int
    kept: int
    share: float
    """Share of the smaller class's pictures that recur in the other."""


def views(pixels: Pixels) -> Floats:
    """Normalised small pictures [N, D]; a flat picture's view is zero, like nothing else."""
    step = -(-max(pixels.shape[-2:]) // _VIEW_SIDE)
    blocks = [np.empty((0, 0), dtype=np.float32)]
    for start in range(0, len(pixels), 2048):
        block = pixels[start : start + 2048]
        grey = block[:, 0] if block.shape[1] == 1 else block.sum(axis=1, dtype=np.int64)
        for axis in (1, 2) if step > 1 else ():
            edges = np.arange(0, grey.shape[axis], step)
            grey = np.add.reduceat(grey, edges, axis=axis, dtype=np.int64)
        blocks.append(_normalised(grey.reshape(len(grey), -1).astype(np.float64)))
    return np.concatenate(blocks[1:] or blocks)


def _normalised(values: npt.NDArray[np.float64]) -> Floats:
    centred = values - values.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    scale = np.divide(_LENGTH, length, out=np.zeros_like(length), where=length > 1.0)
    rounded: Floats = np.rint(centred * scale).astype(np.float32)
    return rounded


def content_hashes(pixels: Pixels) -> list[str]:
    """SHA-256 of each picture's decoded pixels."""
    return [sha256_bytes(picture.tobytes()) for picture in pixels]


def find_look_alikes(
    view: Floats, members: Sequence[Ints], config: DuplicatesConfig, similarity: float
) -> list[LookAlike]:
    """Classes to drop so that no two of those kept are look-alikes.

    Args:
        view: views [N, D].
        members: pictures of each class, the class to be kept first coming first. A class is
            dropped if it resembles one before it that is kept.
    """
    alike: dict[int, list[tuple[int, float]]] = {}
    for first, others in _candidates(view, members, config.num_neighbours).items():
        shares = _recurring_shares(view, members, first, others, similarity)
        for second, share in zip(others, shares, strict=True):
            if share >= config.class_share:
                alike.setdefault(second, []).append((first, share))
    dropped: dict[int, LookAlike] = {}
    for second in sorted(alike):
        kept = [(first, share) for first, share in alike[second] if first not in dropped]
        if kept:
            first, share = max(kept, key=lambda entry: (entry[1], -entry[0]))
            dropped[second] = LookAlike(second, first, share)
    return list(dropped.values())


def _candidates(view: Floats, members: Sequence[Ints], num_neighbours: int) -> dict[int, list[int]]:
    """For each class, the later classes that are near it, or that it is near to."""
    means = _normalised(np.array([view[rows].mean(axis=0, dtype=np.float64) for rows in members]))
    similarity = means @ means.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1, kind="stable")[
        :, : min(num_neighbours, len(means) - 1)
    ]
    near: dict[int, set[int]] = {}
    for a, row in enumerate(nearest.tolist()):
        for b in row:
            near.setdefault(min(a, b), set()).add(max(a, b))
    return {first: sorted(others) for first, others in near.items()}


def _recurring_shares(
    view: Floats, members: Sequence[Ints], first: int, others: list[int], similarity: float
) -> list[float]:
    """One product for all the others: many small ones are slow where threads compete for cores.

    Of the smaller class of a pair, at most 256 pictures are looked for in the whole of the other.
    """
    own = members[first]
    rows = [members[other] for other in others]
    ahead = [other for other in rows if len(own) <= len(other)]
    behind = [_sample(other) for other in rows if len(own) > len(other)]
    found_ahead = _recurs(view, _sample(own), ahead, similarity, axis=1)
    found_behind = _recurs(view, own, behind, similarity, axis=0)
    return [next(found_ahead if len(own) <= len(other) else found_behind) for other in rows]


def _recurs(
    view: Floats, own: Ints, others: list[Ints], similarity: float, *, axis: int
) -> Iterator[float]:
    """Share of own pictures that are in each other class (axis 1), or of its in ours (axis 0)."""
    if others:
        alike = view[own] @ view[np.concatenate(others)].T >= similarity * _LENGTH**2
        ends = np.cumsum([len(other) for other in others])[:-1]
        yield from (float(part.any(axis=axis).mean()) for part in np.split(alike, ends, axis=1))


def _sample(rows: Ints) -> Ints:
    return rows[:: -(-len(rows) // _SAMPLE)]


def find_recurring(
    later: Floats, earlier: Floats, similarity: float, directions: Floats | None = None
) -> dict[int, int]:
    """Every view of `later` that nearly recurs in `earlier`: {its index: its best double's}.

    |u - v| of unit vectors is sqrt(2 - 2 u.v), and a projection on orthonormal directions only
    shortens it: a product in the few directions of most variance rules nearly all pairs out, and
    the full product is taken of the rest. No pair above the similarity is missed.
    """
    if not len(later) or not len(earlier):
        return {}
    if directions is None:
        directions = main_directions(earlier)
    short_later, short_earlier = later @ directions, earlier @ directions
    # |Pu - Pv|^2 <= |u - v|^2 <= |u|^2 + |v|^2 - 2 similarity L^2, with room for float32
    beyond_later = _half_square(later) - _half_square(short_later)
    beyond_earlier = _half_square(earlier) - _half_square(short_earlier)
    floor = (similarity - 1e-4) * _LENGTH**2 - beyond_later
    found: dict[int, int] = {}
    for start in range(0, len(later), _BLOCK):
        rows = slice(start, start + _BLOCK)
        ceiling = short_later[rows] @ short_earlier.T + beyond_earlier
        left, right = np.nonzero(ceiling >= floor[rows, None])
        found.update(_confirm(later, earlier, left + start, right, similarity))
    return found


def _confirm(
    later: Floats, earlier: Floats, left: Ints, right: Ints, similarity: float
) -> dict[int, int]:
    best: dict[int, tuple[float, int]] = {}
    for piece in range(0, len(left), 16384):
        a, b = left[piece : piece + 16384], right[piece : piece + 16384]
        product = np.einsum("ij,ij->i", later[a], earlier[b])
        for k in np.flatnonzero(product >= similarity * _LENGTH**2).tolist():
            best[int(a[k])] = max(best.get(int(a[k]), (0.0, 0)), (float(product[k]), -int(b[k])))
    return {row: -double for row, (_, double) in best.items()}


def _half_square(values: Floats) -> Floats:
    half: Floats = np.einsum("ij,ij->i", values, values) / np.float32(2)
    return half


def main_directions(view: Floats) -> Floats:
    """Orthonormal directions [D, k] in which a sample of views varies most."""
    sample = view[:: -(-len(view) // 8192)]
    moments = sample.astype(np.float64).T @ sample.astype(np.float64)
    return np.linalg.eigh(moments)[1][:, -_NUM_DIRECTIONS:].astype(np.float32)
