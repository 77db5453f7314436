"""Omniglot: 1,623 handwritten characters of 50 alphabets, each drawn by 20 people.

Class = character, example = one person's drawing, group = alphabet. Ink is dark on white, as in
the files; 105x105 pixels are scaled down with an area-weighted bilinear filter.

References:
    Lake et al., Human-level concept learning through probabilistic program induction, 2015.
    Vinyals et al., Matching Networks for One Shot Learning, 2016, arXiv:1606.04080 (rotations).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import PositiveInt, field_validator

from pipeline.core.config import Section
from pipeline.core.errors import DataError
from pipeline.domains.base import (
    DRAWINGS_ALIKE,
    SPLITS,
    Drawn,
    Example,
    Frame,
    Job,
    Pixels,
    Plan,
    Split,
)
from pipeline.domains.pictures import Limits
from pipeline.domains.planning import FEW, Found, drop_rare, make_plan, merge
from pipeline.domains.sources import draw_files, list_source
from pipeline.domains.splits import hold_out

_PARTS: Mapping[str, Split] = {"images_background": "train", "images_evaluation": "test"}
_LINE = re.compile(r"(?P<character>[^/]+/character\d+)(/rot(?P<rotation>000|090|180|270))?")
_ROTATIONS = ("000", "090", "180", "270")
Wanted = Mapping[str, Mapping[str, Split]]
"""Rotations of each character (`Alphabet/characterNN`), each with its split."""


class OmniglotConfig(Section):
    """How Omniglot is split."""

    split_dir: Path | None = None
    """Folder inside `preprocess.source`, e.g. `splits_vinyals`, with train.txt, val.txt and
    test.txt: lines `Alphabet/characterNN[/rotDDD]`. As a part of the source, a changed list makes
    a new store. Without it, Lake's split: background alphabets train, evaluation ones test."""
    num_val_alphabets: PositiveInt = 5
    """Background alphabets that Lake's split holds out for validation."""
    rotations: Literal["none", "train_only", "all"] = "none"
    """Whether a character turned by 90, 180 and 270 degrees is three more classes: nowhere, in the
    training split, or in every split (as Vinyals et al. did)."""

    @field_validator("split_dir")
    @classmethod
    def _inside_the_source(cls, folder: Path | None) -> Path | None:
        if folder is not None and (folder.is_absolute() or ".." in folder.parts):
            raise ValueError(
                "must be a path inside preprocess.source, relative to it. Copy the lists there: "
                "only what lies in the source is watched for changes"
            )
        return folder


@dataclass(frozen=True)
class Omniglot:
    """The omniglot domain."""

    config: OmniglotConfig
    frame: Frame

    def plan(self) -> Plan:
        """List the drawings of upstream's two folders or zips."""
        drawings = sorted(self._drawings())
        characters = {(part, character) for part, character, _, _ in drawings}
        wanted = self._lake(characters) if self.config.split_dir is None else self._listed()
        found: list[Found] = []
        unused: list[str] = []
        for _, character, source, name in drawings:
            rotations = wanted.get(character)
            if rotations is None:
                unused.append(character)
                continue
            alphabet = character.split("/")[0]
            for rotation, split in rotations.items():
                class_name = (
                    character if self.config.rotations == "none" else f"{character}/rot{rotation}"
                )
                example = Example(class_name, alphabet, split, Path(name).stem)
                found.append(Found(example, source, f"{rotation}:{name}"))
        missing = sorted(set(wanted) - {character for _, character in characters})
        if missing:
            raise DataError(
                f"{self._lists_folder()} names characters that {self.frame.source} does not hold, "
                f"e.g. {missing[0]!r}. Give both upstream archives, images_background and "
                "images_evaluation."
            )
        kept, rare = drop_rare(found, self.frame.min_examples)
        notes = Plan(
            (),
            (),
            dropped_classes=merge({FEW: rare, "in no split list": sorted(set(unused))}),
            similarity=DRAWINGS_ALIKE,
            rotation=self.config.rotations,
            facts={"split": "lake" if self.config.split_dir is None else "lists"},
        )
        return make_plan(kept, notes, self.frame)

    def draw(self, job: Job) -> Drawn:
        """Decode drawings, turned as their items say."""
        return draw_files(
            job, self.frame, Limits(), name_of=lambda item: item.partition(":")[2], change=_turn
        )

    def _drawings(self) -> Iterator[tuple[str, str, str, str]]:
        """(part, character, source, name in the source) of every drawing."""
        for part in _PARTS:
            source = self._source(part)
            for name in list_source(source).files:
                pieces = name.split("/")
                if name.lower().endswith(".png") and len(pieces) >= 3:
                    yield part, "/".join(pieces[-3:-1]), str(source), name

    def _source(self, part: str) -> Path:
        for candidate in (self.frame.source / part, self.frame.source / f"{part}.zip"):
            if candidate.exists():
                return candidate
        raise DataError(
            f"{self.frame.source} holds neither {part}/ nor {part}.zip. Download both archives "
            "from github.com/brendenlake/omniglot (folder `python`) and set preprocess.source to "
            "the folder with them."
        )

    def _lake(self, characters: set[tuple[str, str]]) -> Wanted:
        background = {c.split("/")[0] for part, c in characters if part == "images_background"}
        held = hold_out(background, self.config.num_val_alphabets, seed=self.frame.seed)
        splits: dict[str, Split] = {
            c: "val" if part == "images_background" and c.split("/")[0] in held else _PARTS[part]
            for part, c in characters
        }
        return {c: dict.fromkeys(self._rotations(split), split) for c, split in splits.items()}

    def _listed(self) -> Wanted:
        folder = self._lists_folder()
        wanted: dict[str, dict[str, Split]] = {}
        for split in SPLITS:
            for character, rotation in _read_list(folder / f"{split}.txt"):
                rotations = wanted.setdefault(character, {})
                if set(rotations.values()) - {split}:
                    raise DataError(
                        f"{folder}: {character} is in two splits. A character, with "
                        "all its rotations, belongs to one; mend the lists."
                    )
                for turned in _ROTATIONS if rotation is None else (rotation,):
                    if turned in self._rotations(split):
                        rotations[turned] = split
        return {character: rotations for character, rotations in wanted.items() if rotations}

    def _lists_folder(self) -> Path:
        assert self.config.split_dir is not None
        return self.frame.source / self.config.split_dir

    def _rotations(self, split: Split) -> tuple[str, ...]:
        turned = self.config.rotations == "all" or (
            self.config.rotations == "train_only" and split == "train"
        )
        return _ROTATIONS if turned else _ROTATIONS[:1]


def _turn(item: str, pixels: Pixels) -> Pixels:
    return np.rot90(pixels, int(item[:3]) // 90, axes=(1, 2))


def _read_list(path: Path) -> Iterator[tuple[str, str | None]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        raise DataError(
            f"{path} is missing or no text. preprocess.omniglot.split_dir, a folder inside "
            "preprocess.source, needs train.txt, val.txt and test.txt."
        ) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise DataError(
                f"{path}, line {number}: {line[:80]!r} is not of the form "
                "Alphabet/characterNN or Alphabet/characterNN/rotDDD. Mend it."
            )
        yield match["character"], match["rotation"]
