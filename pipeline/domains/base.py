"""The seam between raw data and the store: a domain says what there is, and draws it.

C channels, H and W pixels, K pictures of one job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Frame:
    """What every domain is told: where the raw data are, and what a stored picture looks like."""

    source: Path
    image_size: int
    channels: int
    min_examples: int
    """Classes with fewer examples will not be kept, so a domain need not plan them."""
    seed: int


@dataclass(frozen=True)
class Example:
    """One picture that a domain can draw."""

    class_name: str
    group: str
    split: Split
    name: str
    """What sets it apart inside its class: the typeface, the drawer, the file's path."""


@dataclass(frozen=True)
class Job:
    """A piece of work for one process: examples that share a source, e.g. a typeface."""

    source: str
    first: int
    """Index in the plan of the first example; the job's examples follow one another."""
    items: tuple[str, ...]
    """What to draw of the source, one per example: a character, a path, an archive's member."""


@dataclass(frozen=True)
class Drawn:
    """What became of a job's examples."""

    pixels: Pixels
    """Pictures [K, C, H, W] of the examples that could be drawn."""
    kept: tuple[int, ...]
    """Position in the job of each picture."""
    refused: Mapping[int, str] = field(default_factory=dict)
    """Why the others could not be drawn, by position."""
    converted: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """What was changed to make a drawn picture fit, by position."""


PHOTOGRAPHS_ALIKE = 0.98
"""At 84x84, JPEG quality 20 or more and resizing by 0.6 or more stay above this in 99.7 % of 300
photographs, and the most alike two of 2,400 different ones reach 0.86."""
DRAWINGS_ALIKE = 0.99
"""At 28x28, characters that differ by an accent reach 0.98; the same outline is above 0.99."""


@dataclass(frozen=True)
class Plan:
    """Everything that a domain holds, before a pixel is drawn."""

    examples: tuple[Example, ...]
    jobs: tuple[Job, ...]
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Pictures that were left out already, by reason."""
    dropped_classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Classes that were left out already, by reason."""
    converted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names that had to be changed, by reason."""
    similarity: float = PHOTOGRAPHS_ALIKE
    """Correlation from which two of the domain's pictures count as the same."""
    conflicts: tuple[str, ...] = ()
    """Sentences about classes found in several splits; `strict` refuses them."""
    rotation: str = "none"
    """The rule by which turned copies became classes of their own: part of a number's protocol."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the report should say, e.g. versions of the typefaces."""


@runtime_checkable
class Domain(Protocol):
    """A raw data set, as a frozen value that can be sent to a worker process."""

    def plan(self) -> Plan:
        """List every example without drawing it; same source and configuration, same plan.

        Raises:
            DataError: the source is missing or is not what this domain reads.
        """

    def draw(self, job: Job) -> Drawn:
        """Draw one job's examples, in a worker process; bad pictures are refused, never raised."""
