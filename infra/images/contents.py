"""What each image holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
PYTHON = "3.11"
"""Of every image; the base image must be of this Python."""


@dataclass(frozen=True)
class Image:
    """One image: our package with some extras."""

    name: str
    extras: tuple[str, ...]
    torch: str
    """Which build: "" is the one of the package index (with CUDA, on Linux), "+cpu" is PyTorch's
    own, which is several gigabytes smaller and must be found by `--find-links` or an index."""
    machines: tuple[str, ...]
    """As `uname -m` says them; the first one is resolved, the others get hashes of their own."""

    @property
    def lock(self) -> Path:
        """Every package with its version and hashes."""
        return FOLDER / self.name / "requirements.lock"

    @property
    def bill(self) -> Path:
        """The same packages as CycloneDX, with licences."""
        return FOLDER / self.name / "sbom.cdx.json"

    @property
    def dockerfile(self) -> Path:
        """How it is built."""
        return FOLDER / self.name / "Dockerfile"


IMAGES: Mapping[str, Image] = {
    image.name: image
    for image in (
        Image(
            name="train",
            extras=("track", "s3", "ray", "kubernetes", "glyphs", "sign", "serve", "postgres"),
            torch="",
            machines=("x86_64", "aarch64"),
        ),
        Image(
            name="serve",
            extras=("serve", "track", "sign", "traces", "postgres"),
            torch="+cpu",
            machines=("x86_64",),
        ),
    )
}
