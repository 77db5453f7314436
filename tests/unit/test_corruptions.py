"""Spoilt pictures are what their formulas say, and hang on the seed and the row alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Pictures, corrupt

ROWS = np.arange(40) * 7


def pictures(channels: int = 1, side: int = 28) -> Pictures:
    """Smooth in places, with edges, away from black and white."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 200, (len(ROWS), channels, side // 4, side // 4))
    return coarse.repeat(4, axis=2).repeat(4, axis=3).astype(np.uint8)


def spoil(name: str, x: Pictures, severity: int = 2, seed: int = 0) -> Pictures:
    return corrupt(x, ROWS[: len(x)], name=name, severity=severity, seed=seed)


def strength(name: str, severity: int) -> float:
    return CORRUPTIONS[name].strengths[severity - 1]


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 84), (1, 16)])
def test_each_keeps_shape_and_input_and_spoils_more_with_severity(
    name: str, channels: int, side: int
) -> None:
    x = pictures(channels, side)
    before = x.copy()
    far = []
    for severity in SEVERITIES:
        spoilt = spoil(name, x, severity)
        assert (spoilt.shape, spoilt.dtype) == (x.shape, np.uint8)
        far.append(np.abs(spoilt.astype(float) - x).mean())
    assert 0 < far[0] < far[1] < far[2]
    np.testing.assert_array_equal(x, before)


@given(
    name=st.sampled_from(sorted(CORRUPTIONS)),
    order=st.permutations(range(6)),
    severity=st.sampled_from(SEVERITIES),
)
def test_a_picture_hangs_on_its_seed_and_row_alone(
    name: str, order: list[int], severity: int
) -> None:
    """In any company and order; another row or seed gives another twin where there is chance."""
    x = pictures()[:6]
    together = spoil(name, x, severity)
    moved = corrupt(x[order], ROWS[order], name=name, severity=severity, seed=0)
    np.testing.assert_array_equal(moved, together[order])
    chance = name in {"gaussian_noise", "occlusion", "shift"}
    other_rows = corrupt(x, ROWS[:6] + 1, name=name, severity=severity, seed=0)
    assert np.array_equal(other_rows, together) != chance
    assert np.array_equal(spoil(name, x, severity, seed=1), together) != chance


def test_no_two_share_their_random_words() -> None:
    streams = [one.stream for one in CORRUPTIONS.values()]
    assert len(set(streams)) == len(streams)
    assert min(streams) >= 16


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_on_grey_has_the_stated_spread(severity: int) -> None:
    """Of 40 x 3136 normal numbers the spread is known to 0.2 %; rounding adds 1/12."""
    spoilt = spoil("gaussian_noise", np.full((40, 1, 56, 56), 128, np.uint8), severity)
    sigma = 255 * strength("gaussian_noise", severity)
    inside = np.abs(spoilt.astype(float) - 128) < 0.4 * sigma
    share = math.erf(0.4 / math.sqrt(2))
    assert inside.mean() == pytest.approx(share, abs=0.03)
    if severity == 1:  # hardly anything is cut off
        assert spoilt.std() == pytest.approx(math.sqrt(sigma**2 + 1 / 12), rel=0.01)
        assert spoilt.mean() == pytest.approx(128, abs=0.3)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_blur_leaves_even_pictures_and_spreads_a_point_as_a_gaussian(severity: int) -> None:
    even = np.full((2, 1, 28, 28), 77, np.uint8)
    np.testing.assert_array_equal(spoil("blur", even, severity), even)
    point = np.zeros((1, 1, 28, 28), np.uint8)
    point[0, 0, 14, 14] = 255
    sigma = 28 * strength("blur", severity)
    line = np.exp(-0.5 * ((np.arange(28) - 14) / sigma) ** 2)
    line[np.abs(np.arange(28) - 14) > math.ceil(3 * sigma)] = 0
    line /= line.sum()
    expected = 255 * np.outer(line, line)
    np.testing.assert_allclose(spoil("blur", point, severity)[0, 0], expected, atol=0.501)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_draws_every_channel_to_its_mean(severity: int) -> None:
    x = pictures(channels=3)
    mean = x.mean(axis=(2, 3), keepdims=True)
    expected = mean + (1 - strength("contrast", severity)) * (x - mean)
    np.testing.assert_allclose(spoil("contrast", x, severity), expected, atol=0.501)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_occlusion_is_one_square_in_the_mean(severity: int) -> None:
    x = pictures(channels=3)
    side = round(28 * strength("occlusion", severity))
    marked = np.rint(x.mean(axis=(2, 3)))
    x[np.abs(x - marked[:, :, None, None]) < 1] += 2  # so that a covered pixel always differs
    places = set()
    for before, after in zip(x, spoil("occlusion", x, severity), strict=True):
        rows, columns = np.nonzero((before != after).any(axis=0))
        assert len(rows) == side * side
        assert np.ptp(rows) == np.ptp(columns) == side - 1
        assert len(np.unique(after[0][rows, columns])) == 1
        places.add((rows.min(), columns.min()))
    assert len(places) > 20


@pytest.mark.parametrize("severity", SEVERITIES)
def test_a_shift_moves_the_whole_picture_by_the_stated_distance(severity: int) -> None:
    x = np.random.default_rng(1).integers(0, 256, (40, 2, 28, 28), dtype=np.uint8)
    distance = 28 * strength("shift", severity)
    moves = set()
    for before, after in zip(x, spoil("shift", x, severity), strict=True):
        padded = np.pad(before, ((0, 0), (6, 6), (6, 6)), mode="edge")
        fits = [
            (down, right)
            for down in range(-6, 7)
            for right in range(-6, 7)
            if np.array_equal(padded[:, 6 - down : 34 - down, 6 - right : 34 - right], after)
        ]
        ((down, right),) = fits
        assert math.hypot(down, right) == pytest.approx(distance, abs=math.sqrt(0.5))
        moves.add((down, right))
    assert len(moves) > 4
