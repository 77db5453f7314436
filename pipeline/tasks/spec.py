"""What episodes look like."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Len
from pydantic import Field, PositiveInt, model_validator

from pipeline.core.config import Section

Count = Annotated[int, Ge(1)]
Range = Count | Annotated[list[Count], Len(2, 2)]
"""A fixed count, or [lowest, highest] of which one is drawn for each group of episodes."""


class EpisodeSpec(Section):
    """Shape of the episodes of one stream."""

    ways: Range = 5
    """Classes in an episode: a number, or [lowest, highest]."""
    shots: Range = 1
    """Support examples per class: a number, or [lowest, highest]."""
    queries: PositiveInt = 15
    """Query examples per class."""
    within_group: bool = False
    """Draw all classes of an episode from one group (one script, one alphabet)."""
    imbalanced: bool = False
    """Vary the support examples between classes, from 1 to 2 * shots - 1, keeping their sum."""

    @model_validator(mode="after")
    def _ranges_ascend(self) -> EpisodeSpec:
        for name in ("ways", "shots"):
            low, high = bounds(getattr(self, name))
            if low > high:
                raise ValueError(f"{name}: [{low}, {high}] must be [lowest, highest]")
        if bounds(self.ways)[0] < 2:
            raise ValueError("ways: an episode needs at least 2 classes")
        return self


class FrozenSpec(Section):
    """A grid of episode sets that are drawn once and kept: every ways x shots combination."""

    ways: list[Annotated[int, Ge(2)]] = Field(default=[5], min_length=1)
    """Classes in an episode, one set of episodes for each."""
    shots: list[Count] = Field(default=[1], min_length=1)
    """Support examples per class, one set of episodes for each."""
    queries: PositiveInt = 15
    """Query examples per class."""
    episodes: Annotated[int, Ge(2)] = 600
    """Episodes in each set; an interval needs two."""
    within_group: bool = False
    """Draw all classes of an episode from one group (one script, one alphabet)."""


def bounds(value: int | list[int]) -> tuple[int, int]:
    """Lowest and highest value of a count that is fixed or ranged."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
