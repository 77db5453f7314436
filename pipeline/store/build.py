"""From a domain to a store: draw everything, drop what may not stay, say what and why, write."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from pipeline.core.config import Section
from pipeline.core.errors import DataError
from pipeline.domains.base import SPLITS, Domain, Drawn, Example, Frame, Job, Plan
from pipeline.domains.glyphs import GlyphsConfig
from pipeline.domains.image_folder import ImageFolderConfig
from pipeline.domains.omniglot import OmniglotConfig
from pipeline.domains.table import DOMAINS
from pipeline.store.audit import (
    DuplicatesConfig,
    content_hashes,
    find_look_alikes,
    find_recurring,
    main_directions,
    views,
)
from pipeline.store.drawing import Drawing, Progress, drawing_from_environment
from pipeline.store.reader import StoredClass
from pipeline.store.report import Report
from pipeline.store.writer import Pixels, StoreContent, refused, write_store

Ints = npt.NDArray[np.int64]
ClassKey = tuple[int, str, str]
"""(rank of the split, group, name): the order of classes in a store."""


class PreprocessConfig(Section):
    """The `preprocess` section: which raw data, and what a stored picture looks like."""

    domain: str = "glyphs"
    """Which domain of pipeline/domains to read: glyphs, omniglot or image_folder."""
    source: Path = Path("data/raw")
    """Folder or zip with the raw data; glyphs needs none."""
    image_size: int = Field(default=28, ge=16, le=512)
    """Height and width of a stored picture in pixels."""
    channels: int = Field(default=1, ge=1, le=3)
    """1 for grey, 3 for colour."""
    min_examples_per_class: int = Field(default=20, ge=2)
    """Smaller classes are dropped: an episode needs shots + queries examples of a class."""
    rows_per_shard: PositiveInt = 20_000
    """Pictures in one shard file."""
    strict: bool = False
    """Refuse data in which a class is in two splits or a picture in two classes, instead of
    dropping the second. (glyphs always has such: A is a Latin, a Greek and a Cyrillic letter.)"""
    seed: NonNegativeInt = 0
    """Which classes are held out, where the source does not say."""
    duplicates: DuplicatesConfig = DuplicatesConfig()
    """When pictures, and classes, are too alike."""
    glyphs: GlyphsConfig = GlyphsConfig()
    """Characters drawn in the typefaces of Python packages."""
    omniglot: OmniglotConfig = OmniglotConfig()
    """Handwritten characters."""
    image_folder: ImageFolderConfig = ImageFolderConfig()
    """Your own pictures."""

    @field_validator("domain")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in DOMAINS:
            raise ValueError(f"there is no such domain; there are {', '.join(sorted(DOMAINS))}")
        return name

    @field_validator("channels")
    @classmethod
    def _grey_or_colour(cls, channels: int) -> int:
        if channels == 2:
            raise ValueError("must be 1 (grey) or 3 (colour)")
        return channels


@dataclass
class _Pictures:
    """Everything drawn, and which of it is still to be stored. P pictures, C classes."""

    examples: tuple[Example, ...]
    pixels: Pixels
    """[P, C, H, W]; rows that were refused hold zeros."""
    alive: npt.NDArray[np.bool_]
    """[P]."""
    keys: list[ClassKey]
    class_of: Ints
    """[P] index into `keys`."""

    def members(self) -> list[Ints]:
        """Living pictures of every class, in order of their names."""
        names = np.array([e.name for e in self.examples], dtype=object)
        living = np.flatnonzero(self.alive)
        order = living[np.lexsort((living, names[living], self.class_of[living]))]
        edges = np.searchsorted(self.class_of[order], np.arange(len(self.keys) + 1))
        return [order[a:b] for a, b in itertools.pairwise(edges.tolist())]

    def label(self, picture: int) -> str:
        """How the report names a picture."""
        example = self.examples[picture]
        return f"{example.class_name}: {example.name}"


def build_store(
    config: PreprocessConfig,
    target: Path,
    *,
    progress: Progress | None = None,
    num_workers: int | None = None,
    draw: Drawing | None = None,
) -> dict[str, Any]:
    """Make the store of a domain and return its report.

    The store does not depend on who draws it, nor on the number of workers; `target` is replaced
    only when the new store is whole.

    Args:
        draw: who draws; default: as METALOOM_LAUNCHER says.

    Raises:
        DataError: there is nothing usable, or `strict` refuses what was found.
        StorageError: the disk refused; what was at `target` is as it was.
    """
    domain = _domain(config)
    plan = domain.plan()
    report = Report(plan)
    if config.strict and plan.conflicts:
        raise _strict_error(list(plan.conflicts))
    with _scratch(target, len(plan.examples) * config.channels * config.image_size**2) as scratch:
        found = (draw or drawing_from_environment())(domain, plan.jobs, num_workers=num_workers)
        pictures = _draw(found, plan, config, scratch, report, progress)
        similarity = config.duplicates.similarity or plan.similarity
        _drop_unusable(pictures, config, report, similarity)
        members = [rows for rows in pictures.members() if len(rows)]
        content = _content(config.domain, plan.rotation, pictures, members)
        summary = report.summary(config.domain, content.classes)
        write_store(target, content, rows_per_shard=config.rows_per_shard, report=summary)
    return summary


@contextmanager
def _scratch(target: Path, num_bytes: int) -> Iterator[Any]:
    """A file beside the target for all drawn pictures, with its room taken: to find a disk full
    in the middle of a memory map would end the process."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=target.parent)  # noqa: SIM115
        if num_bytes and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        raise refused(target, error) from error
    with file:
        yield file


def _domain(config: PreprocessConfig) -> Domain:
    frame = Frame(
        source=config.source,
        image_size=config.image_size,
        channels=config.channels,
        min_examples=config.min_examples_per_class,
        seed=config.seed,
    )
    return DOMAINS[config.domain](getattr(config, config.domain), frame)


def _draw(
    drawn_jobs: Iterator[tuple[Job, Drawn]],
    plan: Plan,
    config: PreprocessConfig,
    scratch: Any,
    report: Report,
    progress: Progress | None,
) -> _Pictures:
    total = len(plan.examples)
    if not total:
        raise DataError(
            f"no class of domain {config.domain} has {config.min_examples_per_class} examples. "
            "Lower preprocess.min_examples_per_class."
        )
    shape = (total, config.channels, config.image_size, config.image_size)
    pixels = np.memmap(scratch, dtype=np.uint8, mode="w+", shape=shape)
    alive = np.zeros(total, dtype=np.bool_)
    notes: list[tuple[int, str, bool]] = []
    opened = progress("draw", total=total, unit="pictures") if progress else nullcontext()
    with opened as bar:
        for job, drawn in drawn_jobs:
            rows = job.first + np.array(drawn.kept, dtype=np.int64)
            if len(rows):
                pixels[rows] = drawn.pixels
                alive[rows] = True
            notes += [(job.first + i, reason, True) for i, reason in drawn.refused.items()]
            for i, reasons in drawn.converted.items():
                notes += [(job.first + i, reason, False) for reason in reasons]
            if bar is not None:
                bar.advance(len(job.items))
    keys = [(SPLITS.index(e.split), e.group, e.class_name) for e in plan.examples]
    distinct = sorted(set(keys))
    rank = {key: index for index, key in enumerate(distinct)}
    class_of = np.array([rank[key] for key in keys], dtype=np.int64)
    pictures = _Pictures(plan.examples, pixels, alive, distinct, class_of)
    for row, reason, dropped in sorted(notes):
        (report.drop if dropped else report.convert)(reason, pictures.label(row))
    return pictures


def _drop_unusable(
    pictures: _Pictures, config: PreprocessConfig, report: Report, similarity: float
) -> None:
    """The order matters: a class that will not stay must not push another one out."""
    hashes = content_hashes(pictures.pixels)
    _drop_repeats(pictures, hashes, report)
    _drop_small(pictures, config, report)
    view = views(pictures.pixels)
    conflicts = _drop_look_alikes(pictures, view, config, report, similarity)
    conflicts += _drop_shared(pictures, hashes, report)
    if config.strict and conflicts:
        raise _strict_error(conflicts)
    _drop_leaks(pictures, view, report, similarity)
    _drop_small(pictures, config, report)
    missing = [
        s for s in SPLITS if s not in {SPLITS[pictures.keys[c][0]] for c in _living(pictures)}
    ]
    if missing:
        raise DataError(
            f"no usable class is left in {', '.join(missing)}. What was dropped: "
            f"{report.sentence()}. Lower preprocess.min_examples_per_class, or mend the data."
        )


def _drop_repeats(pictures: _Pictures, hashes: list[str], report: Report) -> None:
    """Support and query must never hold the same picture."""
    seen: set[tuple[int, str]] = set()
    for rows in pictures.members():
        for row in rows.tolist():
            key = (int(pictures.class_of[row]), hashes[row])
            if key in seen:
                pictures.alive[row] = False
                report.drop("the same picture is in its class already", pictures.label(row))
            seen.add(key)


def _drop_small(pictures: _Pictures, config: PreprocessConfig, report: Report) -> None:
    minimum = config.min_examples_per_class
    for (_, _, name), rows in zip(pictures.keys, pictures.members(), strict=True):
        if 0 < len(rows) < minimum:
            pictures.alive[rows] = False
            report.drop_class("fewer examples than the minimum", name, len(rows))


def _drop_look_alikes(
    pictures: _Pictures,
    view: npt.NDArray[np.float32],
    config: PreprocessConfig,
    report: Report,
    similarity: float,
) -> list[str]:
    """Training classes stay, then validation; inside a split the bigger class stays."""
    members = pictures.members()
    order = sorted(_living(pictures), key=lambda c: (pictures.keys[c][0], -len(members[c]), c))
    found = find_look_alikes(view, [members[c] for c in order], config.duplicates, similarity)
    conflicts = []
    for pair in found:
        dropped, kept = order[pair.dropped], order[pair.kept]
        pictures.alive[members[dropped]] = False
        split, stays = SPLITS[pictures.keys[dropped][0]], SPLITS[pictures.keys[kept][0]]
        where = "in its own split" if split == stays else f"of the {stays} split"
        name, other = pictures.keys[dropped][2], pictures.keys[kept][2]
        report.drop_class(
            f"looks like a class {where}", f"{name} ({split}) like {other}", len(members[dropped])
        )
        conflicts.append(f"class {name!r} ({split}) looks like {other!r} ({stays})")
    return conflicts


def _drop_shared(pictures: _Pictures, hashes: list[str], report: Report) -> list[str]:
    """A picture with two labels stays in the first class only."""
    owner: dict[str, int] = {}
    conflicts = []
    for rows in pictures.members():
        for row in rows.tolist():
            first = owner.setdefault(hashes[row], row)
            if first != row:
                pictures.alive[row] = False
                names = f"{pictures.label(row)} is {pictures.label(first)}"
                report.drop("the same picture is in another class", names)
                conflicts.append(names)
    return conflicts


def _drop_leaks(
    pictures: _Pictures, view: npt.NDArray[np.float32], report: Report, similarity: float
) -> None:
    """Nearly the same picture on both sides of a split: it stays in the earlier one."""
    directions = main_directions(view)
    for split in (1, 2):
        ranks = np.array([key[0] for key in pictures.keys])[pictures.class_of]
        later = np.flatnonzero(pictures.alive & (ranks == split))
        earlier = np.flatnonzero(pictures.alive & (ranks < split))
        for a, b in sorted(
            find_recurring(view[later], view[earlier], similarity, directions).items()
        ):
            pictures.alive[later[a]] = False
            names = f"{pictures.label(int(later[a]))} is nearly {pictures.label(int(earlier[b]))}"
            report.drop("nearly the same picture is in an earlier split", names)
        later = later[pictures.alive[later]]
        mirrored = views(pictures.pixels[later][..., ::-1])
        for a, b in sorted(find_recurring(mirrored, view[earlier], similarity, directions).items()):
            names = f"{pictures.label(int(later[a]))} mirrors {pictures.label(int(earlier[b]))}"
            report.note("its mirror image is in an earlier split (kept)", names)


def _living(pictures: _Pictures) -> list[int]:
    return [int(c) for c in np.unique(pictures.class_of[pictures.alive])]


def _content(domain: str, rotation: str, pictures: _Pictures, members: list[Ints]) -> StoreContent:
    classes = []
    offset = 0
    for rows in members:
        rank, group, name = pictures.keys[int(pictures.class_of[rows[0]])]
        classes.append(StoredClass(name, group, SPLITS[rank], offset, len(rows)))
        offset += len(rows)
    order = np.concatenate(members)
    names = [pictures.examples[row].name for row in order.tolist()]
    return StoreContent(domain, tuple(classes), pictures.pixels, order, names, rotation)


def _strict_error(conflicts: list[str]) -> DataError:
    shown = "\n  ".join(conflicts[:10])
    return DataError(
        f"preprocess.strict refuses {len(conflicts)} conflicts:\n  {shown}\nMend the data, or set "
        "preprocess.strict to false: the second of each pair is then dropped and reported."
    )
