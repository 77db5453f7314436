"""Anybody's pictures: folders of classes, folders of splits of classes, or CSV lists.

Three layouts are told apart by what lies at the top:

- `train.csv`, `val.csv`, `test.csv` or one CSV file: columns `filename`, `label` and, if wanted,
  `group` and `split`; the pictures lie beside it or in a folder beside it;
- folders `train`, `val` (or `validation`, `valid`) and `test`, each with a folder per class;
- a folder per class.

A folder whose pictures are all in one zip is read as that zip.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from pydantic import Field, PositiveInt

from pipeline.core.config import Section
from pipeline.core.errors import DataError
from pipeline.domains.base import SPLITS, Drawn, Example, Frame, Job, Plan, Split
from pipeline.domains.pictures import Limits
from pipeline.domains.planning import (
    FEW,
    Found,
    drop_rare,
    fill_splits,
    keep_first_split,
    make_plan,
    merge,
)
from pipeline.domains.sources import (
    Listing,
    draw_files,
    inner_archive,
    list_source,
    odd_names,
    printable,
    read_file,
)

_SPLIT_NAMES: Mapping[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_MAX_LIST_BYTES = 200_000_000
_MAX_HEADER_BYTES = 65_536
_COLUMNS = frozenset({"filename", "label"})
_ONE_GROUP = "all"


class ImageFolderConfig(Section):
    """How a folder of pictures is read."""

    val_share: float = Field(default=0.16, gt=0, lt=1)
    """Share of the classes that is held out for validation, if the source names none: at least 5
    classes where there are 15 or more, at least 2 where there are 6 or more."""
    test_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of the classes that is held out for testing, if the source names none; with the
    same least numbers as for validation."""
    exclude: tuple[str, ...] = ()
    """Classes to leave out, e.g. a folder of unlabelled background."""
    max_bytes: PositiveInt = 10_000_000
    """Larger files are refused."""
    max_pixels: PositiveInt = 4_000_000
    """Pictures with more pixels are refused before they are decoded."""
    max_side: PositiveInt = 4096
    """Pictures that are wider or higher are refused before they are decoded."""


@dataclass
class _Notes:
    """What reading the layout leaves behind."""

    dropped: dict[str, list[str]] = field(default_factory=dict)
    dropped_classes: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, name: str) -> None:
        self.dropped.setdefault(reason, []).append(name)


@dataclass(frozen=True)
class ImageFolder:
    """The image_folder domain."""

    config: ImageFolderConfig
    frame: Frame

    def plan(self) -> Plan:
        """Find the layout, list the pictures, and make the splits disjoint and complete."""
        listing = list_source(self.frame.source)
        archive = inner_archive(self.frame.source, listing.files)
        return self._plan(listing) if archive is None else self._plan_of(archive, listing)

    def draw(self, job: Job) -> Drawn:
        """Decode a job's files."""
        limits = Limits(self.config.max_bytes, self.config.max_pixels, self.config.max_side)
        return draw_files(job, self.frame, limits)

    def _plan_of(self, archive: str, listing: Listing) -> Plan:
        """The plan of a zip in the source, as if it had been given."""
        beside = [name for name in listing.files if name != archive]
        lists = [name for name in beside if name.lower().endswith(".csv") and self._is_list(name)]
        if lists:
            raise DataError(
                f"{self.frame.source} holds the list {lists[0]} beside the zip {archive}. Put the "
                "list into the zip, or unpack the zip beside the list."
            )
        source = self.frame.source / archive
        plan = replace(self, frame=replace(self.frame, source=source))._plan(list_source(source))
        left = {**listing.dropped, "beside the zip that was read": beside}
        outer = {reason: [printable(n) for n in names] for reason, names in left.items()}
        return replace(
            plan,
            dropped=merge(plan.dropped, outer),
            facts={**plan.facts, "read_from": printable(archive)},
        )

    def _plan(self, listing: Listing) -> Plan:
        notes = _Notes()
        found, layout = self._find(listing, notes)
        if not found:
            raise DataError(
                f"{self.frame.source} holds no pictures in class folders. It needs a folder per "
                "class, or train/, val/ and test/ with a folder per class each, or a CSV list."
            )
        named = {f.example.split for f in found}
        kept, twice = keep_first_split(self._without_excluded(found, notes))
        kept, rare = drop_rare(kept, self.frame.min_examples)
        if not kept:
            raise DataError(
                f"no class of {self.frame.source} has {self.frame.min_examples} pictures. Lower "
                "preprocess.min_examples_per_class, or add pictures."
            )
        gone = sorted(named - {f.example.split for f in kept})
        if gone:
            raise DataError(
                f"{self.frame.source} has no usable class of its own in {', '.join(gone)}: a class "
                f"must have {self.frame.min_examples} pictures and be in one split only. Move "
                "classes, not pictures, to other splits, or put all class folders in one folder: "
                "they are then split for you."
            )
        kept = fill_splits(
            kept,
            val_share=self.config.val_share,
            test_share=self.config.test_share,
            seed=self.frame.seed,
        )
        return make_plan(kept, self._report(listing, notes, twice, rare, layout), self.frame)

    def _find(self, listing: Listing, notes: _Notes) -> tuple[list[Found], str]:
        stray = {n for n in _beside_folders(listing.files) if not self._is_list(n)}
        for name in sorted(stray):
            notes.drop("CSV without the columns filename and label", name)
        files = tuple(name for name in listing.files if name not in stray)
        prefix = _common_folder(files)
        inner = [name.removeprefix(prefix) for name in files]
        notes.dropped_classes["no pictures"] = [
            folder.removeprefix(prefix) for folder in listing.empty_folders
        ]
        lists = _lists([name for name in inner if "/" not in name])
        if lists:
            return list(self._from_lists(lists, prefix, set(inner), notes)), "lists"
        tops = {name.split("/")[0] for name in inner if name.count("/") >= 2}
        if "train" in tops:
            return list(self._from_folders(inner, prefix, notes, depth=1)), "split folders"
        return list(self._from_folders(inner, prefix, notes, depth=0)), "class folders"

    def _from_folders(
        self, names: list[str], prefix: str, notes: _Notes, *, depth: int
    ) -> Iterator[Found]:
        for name in names:
            parts = name.split("/")
            split = _SPLIT_NAMES.get(parts[0]) if depth else "train"
            if len(parts) < depth + 2:
                notes.drop("not in a class folder", name)
            elif split is None:
                notes.drop("not in train, val or test", name)
            else:
                yield self._found(prefix + name, name, parts[depth], _ONE_GROUP, split)

    def _from_lists(
        self, lists: Mapping[str, Split | None], prefix: str, names: set[str], notes: _Notes
    ) -> Iterator[Found]:
        folders = ["", *sorted({f"{name.split('/')[0]}/" for name in names if "/" in name})]
        groups: dict[str, str] = {}
        for path, split in lists.items():
            for where, row in self._rows(prefix + path):
                home = split or _SPLIT_NAMES.get((row.get("split") or "train").strip().lower())
                if home is None:
                    raise DataError(f"{where}: split {row['split']!r} is none of {_SPLIT_NAMES}.")
                label, group = row["label"].strip(), (row.get("group") or _ONE_GROUP).strip()
                if groups.setdefault(label, group) != group:
                    raise DataError(
                        f"{where}: class {label!r} is in group {group!r} here and in "
                        f"{groups[label]!r} before. A class belongs to one group; mend the list."
                    )
                filename = str(PurePosixPath(row["filename"].strip()))
                folder = next((f for f in folders if f + filename in names), None)
                if not label:
                    notes.drop("no label in the list", filename)
                elif filename.startswith("/") or ".." in filename.split("/"):
                    notes.drop("outside the source", filename)
                elif folder is None:
                    notes.drop("listed, but not there", filename)
                else:
                    yield self._found(prefix + folder + filename, filename, label, group, home)

    def _is_list(self, path: str) -> bool:
        """Whether a CSV file is a list; one that is named after a split is meant as one."""
        if PurePosixPath(path).stem.lower() in _SPLIT_NAMES:
            return True
        content = read_file(self.frame.source, path, max_bytes=_MAX_HEADER_BYTES)
        header = content[:_MAX_HEADER_BYTES].decode("utf-8-sig", "replace").splitlines()[:1]
        try:
            return any(set(row) >= _COLUMNS for row in csv.reader(header))
        except csv.Error:
            return False

    def _rows(self, path: str) -> Iterator[tuple[str, dict[str, str]]]:
        content = read_file(self.frame.source, path, max_bytes=_MAX_LIST_BYTES)
        try:
            reader = csv.DictReader(
                io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True
            )
            missing = _COLUMNS - set(reader.fieldnames or ())
            if missing:
                raise DataError(
                    f"{path} has no column {' and no column '.join(sorted(missing))}. Its first "
                    "line must be `filename,label`, and may go on with `,group` and `,split`. If "
                    "it is no list of pictures, take it out of preprocess.source."
                )
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if row["filename"] is None or row["label"] is None:
                    raise DataError(f"{where} has too few columns. Mend it.")
                yield where, row
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(
                f"{path} is not a CSV file in UTF-8: {error}. Save it as one."
            ) from None

    def _found(self, path: str, name: str, label: str, group: str, split: Split) -> Found:
        example = Example(printable(label), printable(group), split, printable(name))
        return Found(example, str(self.frame.source), path)

    def _without_excluded(self, found: list[Found], notes: _Notes) -> list[Found]:
        present = {f.example.class_name for f in found}
        unknown = sorted(set(self.config.exclude) - present)
        if unknown:
            raise DataError(
                f"preprocess.image_folder.exclude names {unknown}, and {self.frame.source} has no "
                f"such class. It has, among others: {sorted(present)[:5]}."
            )
        if self.config.exclude:
            notes.dropped_classes["excluded by configuration"] = sorted(self.config.exclude)
        return [f for f in found if f.example.class_name not in self.config.exclude]

    def _report(
        self,
        listing: Listing,
        notes: _Notes,
        twice: list[Found],
        rare: tuple[str, ...],
        layout: str,
    ) -> Plan:
        repeated = sorted({f.example.class_name for f in twice})
        return Plan(
            (),
            (),
            dropped=merge(
                {
                    reason: [printable(n) for n in names]
                    for reason, names in listing.dropped.items()
                },
                {reason: [printable(n) for n in names] for reason, names in notes.dropped.items()},
                {"its class is in an earlier split": [f.example.name for f in twice]},
            ),
            dropped_classes=merge(notes.dropped_classes, {FEW: rare}),
            converted=merge({"odd file name": [printable(n) for n in odd_names(listing.files)]}),
            conflicts=tuple(f"class {name!r} is in several splits" for name in repeated),
            facts={"layout": layout},
        )


def _common_folder(names: tuple[str, ...]) -> str:
    """A single folder around everything, e.g. the one that an archive unpacks to."""
    prefix = ""
    while True:
        inner = [name.removeprefix(prefix) for name in names]
        tops = {name.split("/")[0] for name in inner}
        around = len(tops) == 1 and not tops & set(_SPLIT_NAMES)
        depths = [name.count("/") + name.lower().endswith(".csv") for name in inner]
        if not around or min(depths) < 2:
            return prefix
        prefix += f"{tops.pop()}/"


def _beside_folders(names: tuple[str, ...]) -> list[str]:
    """CSV files that lie beside folders of other files."""
    lists = [name for name in names if name.lower().endswith(".csv")]
    around = {
        folder
        for name in (set(names) - set(lists) if lists else ())
        for folder in PurePosixPath(name).parent.parents
    }
    return [name for name in lists if PurePosixPath(name).parent in around]


def _lists(names: list[str]) -> dict[str, Split | None]:
    lists = [name for name in names if name.lower().endswith(".csv")]
    named = {name: _SPLIT_NAMES.get(Path(name).stem.lower()) for name in lists}
    by_split = {name: split for name, split in named.items() if split is not None}
    if by_split:
        return dict(sorted(by_split.items(), key=lambda entry: SPLITS.index(entry[1])))
    if len(lists) > 1:
        raise DataError(
            f"the source holds several lists, {lists[:5]}. Name them train.csv, val.csv and "
            "test.csv, or keep one."
        )
    return dict(named)
