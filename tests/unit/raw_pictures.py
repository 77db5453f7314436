"""Raw picture folders for tests: written with Pillow, from a seed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def noise(seed: int, size: int = 40, *, coarse: int = 8) -> np.ndarray:
    """A smooth random colour picture [H, W, 3], unlike that of any other seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (coarse, coarse, 3), dtype=np.uint8))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


def encode(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    """A picture file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write_classes(
    root: Path, names: list[str], *, count: int = 4, size: int = 40, first_seed: int = 0
) -> None:
    """`count` PNG files in a folder for each class."""
    for index, name in enumerate(names):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for example in range(count):
            seed = first_seed + index * 1000 + example
            (folder / f"{example:02d}.png").write_bytes(encode(noise(seed, size)))
