"""Random moves of training pictures: drawn as small integers on the host, applied on the device.

G groups, E episodes (or examples) in each, P pictures of an episode, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.core.config import Section
from pipeline.core.errors import ConfigError
from pipeline.core.seeding import UInts, random_words
from pipeline.tasks.sampler import Ints
from pipeline.training.pictures import to_device

EPISODE_MOVES, EXAMPLE_MOVES = 6, 7
"""Streams of random words; the sampler's are 1 to 4, the order of pre-training's examples is 5."""


class AugmentConfig(Section):
    """Random moves of every training picture; validation and test pictures stay as they are.

    Drawn anew whenever a picture is used, support and query alike, from the seed that draws the
    episodes (in pre-training: the examples).
    """

    max_shift: int = Field(default=0, ge=0)
    """Largest shift up, down, left and right, in pixels; the border's pixels are repeated."""
    flip: bool = False
    """Mirror every other picture left to right, by a coin; not where a mirrored class is another
    class, as with characters."""

    @property
    def on(self) -> bool:
        """Whether anything can move."""
        return self.max_shift > 0 or self.flip

    def check_fits(self, image_shape: tuple[int, int, int], *, where: str) -> None:
        """Pictures (C, H, W) keep something of themselves.

        Raises:
            ConfigError: a shift can be as large as the picture.
        """
        side = min(image_shape[1:])
        if self.max_shift >= side:
            raise ConfigError(
                f"{where}.max_shift is {self.max_shift}, but the pictures have {side} pixels on a "
                f"side, and nothing of them would be left. Lower it below {side}."
            )


OFF = AugmentConfig()
"""No moves."""


def draw_moves(
    config: AugmentConfig, *, seed: int, stream: int, indices: Iterable[Ints], sizes: Sequence[int]
) -> list[Tensor | None]:
    """The moves of G groups by one call; None for each, and nothing drawn, where all is off.

    A move is pure in (seed, stream, the episode's index, the picture's place in the episode).

    Args:
        indices: [E] of each group, places of its episodes in the training stream.
        sizes: P of each group.

    Returns:
        For each group moves [E, P, 3]: pixels down, pixels right, and 1 if mirrored before that.
    """
    if not config.on:
        return [None] * len(sizes)
    words = random_words(seed, stream, np.stack(list(indices)), max(sizes))
    span = 2 * config.max_shift + 1
    down, words = _digit(words, span)
    right, words = _digit(words, span)
    mirrored, _ = _digit(words, 1 + config.flip)
    moves = np.stack([down - config.max_shift, right - config.max_shift, mirrored], axis=-1)
    parts = (m[:, :size] for m, size in zip(moves, sizes, strict=True))
    # Contiguous, because a strided tensor goes to a GPU by way of memory that is not pinned.
    return [torch.from_numpy(np.ascontiguousarray(part)) for part in parts]


def moved(pictures: Tensor, moves: Tensor | None) -> Tensor:
    """Pictures [..., C, H, W] of any type, moved where they lie, without waiting for a device.

    Gathering by integer indices is exact and has one order, so it gives the same bits everywhere.

    Args:
        moves: [..., 3] on the host, one for each picture; None leaves them as they are.
    """
    if moves is None:
        return pictures
    channels, height, width = pictures.shape[-3:]
    down, right, mirrored = to_device(moves, pictures.device).reshape(-1, 3, 1).unbind(1)
    row = (torch.arange(height, device=pictures.device) - down).clamp_(0, height - 1)
    column = (torch.arange(width, device=pictures.device) - right).clamp_(0, width - 1)
    column = torch.where(mirrored == 1, width - 1 - column, column)
    pixel = (row[:, :, None] * width + column[:, None, :]).flatten(1)
    flat = pictures.reshape(-1, channels, height * width)
    return flat.gather(2, pixel[:, None, :].expand_as(flat)).view(pictures.shape)


def _digit(words: UInts, base: int) -> tuple[Ints, UInts]:
    """A digit in [0, base) of words / 2**32, and what follows it as words: one serves several.

    Off uniform by less than the product of the bases / 2**32.
    """
    scaled = words * np.uint64(base)
    return (scaled >> np.uint64(32)).astype(np.int64), scaled & np.uint64(0xFFFFFFFF)
