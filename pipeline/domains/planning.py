"""From found files to a plan: jobs of equal size, rare classes left out, splits made disjoint."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.core.errors import DataError
from pipeline.domains.base import SPLITS, Example, Frame, Job, Plan, Split
from pipeline.domains.splits import hold_out

_JOB_PICTURES = 256
_JOB_BYTES = 64 << 20
FEW = "fewer examples than the minimum"


@dataclass(frozen=True)
class Found:
    """An example and where to read it."""

    example: Example
    source: str
    item: str


def keep_first_split(found: Iterable[Found]) -> tuple[list[Found], list[Found]]:
    """Keep each class in the first split that has it; return (kept, left out)."""
    kept: list[Found] = []
    left: list[Found] = []
    home: dict[str, Split] = {}
    for entry in sorted(found, key=lambda f: SPLITS.index(f.example.split)):
        split = home.setdefault(entry.example.class_name, entry.example.split)
        (kept if split == entry.example.split else left).append(entry)
    return kept, left


def fill_splits(
    found: Sequence[Found], *, val_share: float, test_share: float, seed: int
) -> list[Found]:
    """Move a seeded share of the training classes to each split that has none.

    Raises:
        DataError: there are too few classes for three splits.
    """
    classes = {f.example.class_name: f.example.split for f in found}
    total = len(classes)
    wanted: list[tuple[Split, float]] = [("test", test_share), ("val", val_share)]
    for split, share in wanted:
        if split in classes.values():
            continue
        training = [name for name, home in classes.items() if home == "train"]
        count = max(1, round(share * total))
        if count >= len(training):
            raise DataError(
                f"{len(training)} training classes with enough pictures are too few to hold some "
                f"out for the split {split!r}. Add classes, or lower "
                "preprocess.min_examples_per_class."
            )
        for name in hold_out(training, count, seed=seed):
            classes[name] = split
    return [
        replace(f, example=replace(f.example, split=classes[f.example.class_name])) for f in found
    ]


def make_plan(found: Iterable[Found], notes: Plan, frame: Frame) -> Plan:
    """Add examples and jobs to a plan that holds the notes about what was left out."""
    size = max(1, min(_JOB_PICTURES, _JOB_BYTES // (frame.channels * frame.image_size**2)))
    by_source: dict[str, list[Found]] = defaultdict(list)
    for entry in found:
        by_source[entry.source].append(entry)
    examples: list[Example] = []
    jobs: list[Job] = []
    for source, entries in sorted(by_source.items()):
        for start in range(0, len(entries), size):
            chunk = entries[start : start + size]
            jobs.append(Job(source, len(examples), tuple(entry.item for entry in chunk)))
            examples.extend(entry.example for entry in chunk)
    return replace(notes, examples=tuple(examples), jobs=tuple(jobs))


def drop_rare(found: Sequence[Found], minimum: int) -> tuple[list[Found], tuple[str, ...]]:
    """Leave out classes with too few examples; return (kept, names of the others)."""
    counts = Counter(f.example.class_name for f in found)
    rare = {name for name, count in counts.items() if count < minimum}
    return [f for f in found if f.example.class_name not in rare], tuple(sorted(rare))


def merge(*parts: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Join reports by reason."""
    joined: dict[str, list[str]] = defaultdict(list)
    for part in parts:
        for reason, names in part.items():
            joined[reason].extend(names)
    return {reason: tuple(names) for reason, names in sorted(joined.items()) if names}
