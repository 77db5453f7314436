"""Spoilt pictures: what a camera, a scanner or a hand does, at three severities.

n pictures, C channels, H and W pixels; s is a corruption's strength at a severity.

The idea is Hendrycks and Dietterich's, Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations, 2019, arXiv:1903.12261. Their parameters are for photographs of
224 pixels; these are our own, as shares of the picture's side, for pictures of 28 and more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.core.seeding import UInts, random_words

Pictures: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]
Draw: TypeAlias = Callable[[int], UInts]
"""So many 32-bit words for each picture [n, words]."""
Apply: TypeAlias = Callable[[Floats, float, Draw], Floats]
"""Pictures [n, C, H, W] in [0, 255], strength and randomness -> pictures."""

SEVERITIES = (1, 2, 3)
_WORDS = 2.0**32


@dataclass(frozen=True)
class Corruption:
    """One way to spoil a picture."""

    apply: Apply
    strengths: tuple[float, float, float]
    """By severity."""
    stream: int
    """Of random words, shared with nothing else; training's streams are below 16."""


def corrupt(
    pictures: Pictures, rows: npt.NDArray[Any], *, name: str, severity: int, seed: int
) -> Pictures:
    """Spoil pictures [n, C, H, W]; a picture's spoilt twin depends on (seed, row) alone.

    A higher severity is more of the same: it draws the same random numbers.

    Args:
        rows: [n] what the randomness of each picture hangs on.
        name: of a row of `CORRUPTIONS`.
        severity: 1, 2 or 3.
    """
    one = CORRUPTIONS[name]
    draw = partial(random_words, seed, one.stream, rows)
    spoilt = one.apply(pictures.astype(np.float32), one.strengths[severity - 1], draw)
    return np.rint(np.clip(spoilt, 0, 255)).astype(np.uint8)


def gaussian_noise(x_nCHW: Floats, strength: float, draw: Draw) -> Floats:
    """x + 255 s z with z standard normal, by Box and Muller's transform."""
    size = math.prod(x_nCHW.shape[1:])
    uniform = (draw(size + size % 2) + 0.5) / _WORDS
    radius, angle = np.sqrt(-2 * np.log(uniform[:, 0::2])), 2 * np.pi * uniform[:, 1::2]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :size]
    noisy: Floats = x_nCHW + (255 * strength * normal).reshape(x_nCHW.shape).astype(np.float32)
    return noisy


def blur(x_nCHW: Floats, strength: float, draw: Draw) -> Floats:
    """Gaussian blur of standard deviation s times the shorter side; the border is repeated."""
    del draw
    sigma = strength * min(x_nCHW.shape[2:])
    return _smooth(_smooth(x_nCHW, sigma, axis=2), sigma, axis=3)


def contrast(x_nCHW: Floats, strength: float, draw: Draw) -> Floats:
    """m + (1 - s)(x - m), with m the mean of each channel of the picture."""
    del draw
    mean = x_nCHW.mean(axis=(2, 3), keepdims=True)
    flat: Floats = mean + np.float32(1 - strength) * (x_nCHW - mean)
    return flat


def occlusion(x_nCHW: Floats, strength: float, draw: Draw) -> Floats:
    """A square of s times the shorter side, anywhere inside, in the channel's mean."""
    height, width = x_nCHW.shape[2:]
    side = max(1, round(strength * min(height, width)))
    words = draw(2)
    rows = _inside(words[:, 0], height, side)[:, None, :, None]
    columns = _inside(words[:, 1], width, side)[:, None, None, :]
    mean = x_nCHW.mean(axis=(2, 3), keepdims=True)
    return np.where(rows & columns, mean, x_nCHW)


def shift(x_nCHW: Floats, strength: float, draw: Draw) -> Floats:
    """Moved by s times the shorter side in any direction; the border is repeated."""
    height, width = x_nCHW.shape[2:]
    angle = 2 * np.pi * draw(1)[:, 0] / _WORDS
    distance = strength * min(height, width)
    down, right = (np.rint(distance * f(angle)).astype(int) for f in (np.sin, np.cos))
    rows = np.clip(np.arange(height) - down[:, None], 0, height - 1)[:, None, :, None]
    columns = np.clip(np.arange(width) - right[:, None], 0, width - 1)[:, None, None, :]
    picture = np.arange(len(x_nCHW))[:, None, None, None]
    channel = np.arange(x_nCHW.shape[1])[None, :, None, None]
    moved: Floats = x_nCHW[picture, channel, rows, columns]
    return moved


def _smooth(x_nCHW: Floats, sigma: float, axis: int) -> Floats:
    """Convolved along one axis with a Gaussian that is cut off at three standard deviations."""
    reach = max(1, math.ceil(3 * sigma))
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    length = x_nCHW.shape[axis]
    smooth = np.zeros_like(x_nCHW)
    for offset, weight in zip(offsets, weights, strict=True):
        taken = np.clip(np.arange(length) + offset, 0, length - 1)
        smooth += np.float32(weight) * x_nCHW.take(taken, axis=axis)
    return smooth


def _inside(words_n: UInts, length: int, side: int) -> npt.NDArray[np.bool_]:
    """[n, length]: a stretch of `side` places that lies anywhere inside."""
    first = (words_n % np.uint64(length - side + 1)).astype(int)[:, None]
    places = np.arange(length)
    inside: npt.NDArray[np.bool_] = (places >= first) & (places < first + side)
    return inside


CORRUPTIONS: Mapping[str, Corruption] = {
    "gaussian_noise": Corruption(gaussian_noise, (0.08, 0.16, 0.28), 16),
    "blur": Corruption(blur, (0.02, 0.035, 0.055), 17),
    "contrast": Corruption(contrast, (0.4, 0.6, 0.8), 18),
    "occlusion": Corruption(occlusion, (0.2, 0.3, 0.4), 19),
    "shift": Corruption(shift, (0.05, 0.1, 0.15), 20),
}
