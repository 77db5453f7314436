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
_FULL_SPLIT = 5
"""Classes for the usual episode of five ways."""
_SMALLEST_SPLIT = 2
"""Classes below which there is nothing to tell apart."""
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

    Each split, training among them, gets at least 5 classes where they suffice for that, else at
    least 2.

    Raises:
        DataError: there are too few classes, or the shares leave too few for training.
    """
    classes = {f.example.class_name: f.example.split for f in found}
    shares: dict[Split, float] = {"test": test_share, "val": val_share}
    missing = [split for split in shares if split not in classes.values()]
    least = _least_classes(list(classes.values()).count("train"), missing)
    counts = {split: max(least, round(shares[split] * len(classes))) for split in missing}
    for split, count in counts.items():
        training = [name for name, home in classes.items() if home == "train"]
        if len(training) - count < least:
            raise DataError(
                f"holding out {' and '.join(f'{n} for {s}' for s, n in counts.items())} of "
                f"{len(classes)} usable classes leaves fewer than {least} for train. Lower "
                "preprocess.image_folder.val_share and test_share."
            )
        for name in hold_out(training, count, seed=seed):
            classes[name] = split
    return [
        replace(f, example=replace(f.example, split=classes[f.example.class_name])) for f in found
    ]


def _least_classes(num_training: int, missing: Sequence[Split]) -> int:
    """How many classes training and each missing split must have, out of the training classes."""
    parts = len(missing) + 1
    needed = _SMALLEST_SPLIT * parts
    if missing and num_training < needed:
        raise DataError(
            f"{num_training} usable classes were found to train on, and {needed} are needed: the "
            f"source names no classes for {' and '.join(missing)}, so they are held out of these, "
            f"and each split needs {_SMALLEST_SPLIT} to tell apart. A class is usable if it has "
            "preprocess.min_examples_per_class pictures and is not excluded. Add classes, or lower "
            "that number."
        )
    return _FULL_SPLIT if num_training >= _FULL_SPLIT * parts else _SMALLEST_SPLIT


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
