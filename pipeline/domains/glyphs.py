"""Characters drawn in typefaces that come with Python packages.

Class = character, example = one typeface's drawing of it, group = script. Ink is dark on white, as
in a picture of a printed page.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from pydantic import Field, PositiveFloat

from pipeline.core.config import Section
from pipeline.core.errors import DataError
from pipeline.domains.base import DRAWINGS_ALIKE, Drawn, Example, Frame, Job, Pixels, Plan, Split
from pipeline.domains.splits import hold_out

_SUFFIXES = (".ttf", ".otf")
# matplotlib also ships symbol, size-variant and last-resort fonts, which hold no letters.
_MATPLOTLIB_PREFIXES = ("DejaVu", "STIXGeneral")
_LETTERS = frozenset({"Lu", "Ll", "Lt", "Lo"})
_SUPERSAMPLING = 4
_BASELINE = 0.74
"""Height of the baseline from the top: room for accented capitals above, descenders below."""
_MARGIN = 0.04
_FAINTEST = 239
"""A drawing with no darker pixel counts as blank."""


class GlyphsConfig(Section):
    """Which characters, from which typefaces."""

    packages: dict[str, str] = Field(
        default={
            "font-amatic-sc": "0.0.4",
            "font-caladea": "0.0.2",
            "font-fredoka-one": "0.0.4",
            "font-hanken-grotesk": "0.0.2",
            "font-intuitive": "0.0.4",
            "font-lato": "0.1.0",
            "font-manrope": "0.0.2",
            "font-rhd": "0.1.3",
            "font-roboto": "0.0.1",
            "font-source-sans-pro": "0.0.1",
            "font-source-serif-pro": "0.0.1",
            "matplotlib": "3.11.2",
        },
        min_length=1,
    )
    """Packages that hold the typefaces, each with the exact version that must be installed."""
    train_scripts: tuple[str, ...] = ("LATIN",)
    """Scripts to train on; the first word of a character's Unicode name."""
    test_scripts: tuple[str, ...] = ("GREEK", "CYRILLIC")
    """Scripts that only the test split holds."""
    val_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of the training scripts' characters that is held out for validation."""
    max_marks: int = Field(default=1, ge=0)
    """Diacritics that a letter may carry. Letters that differ in one of several (as in polytonic
    Greek) differ in two or three pixels at 28x28."""
    em_share: PositiveFloat = 0.95
    """Type size (em) as a share of the picture's height; what does not fit is shrunk."""


@dataclass(frozen=True)
class Glyphs:
    """The glyphs domain."""

    config: GlyphsConfig
    frame: Frame

    def plan(self) -> Plan:
        """List the letters of the configured scripts that enough typefaces have."""
        files = sorted(_typefaces(self.config.packages), key=lambda path: path.name)
        characters = {path: self._letters(path) for path in files}
        counts: dict[str, int] = defaultdict(int)
        for letters in characters.values():
            for letter in letters:
                counts[letter] += 1
        marked = sorted(c for c in counts if _num_marks(c) > self.config.max_marks)
        rare = sorted(c for c in set(counts) - set(marked) if counts[c] < self.frame.min_examples)
        splits = self._splits(sorted(set(counts) - set(rare) - set(marked)))
        examples: list[Example] = []
        jobs: list[Job] = []
        for path, letters in characters.items():
            kept = [letter for letter in letters if letter in splits]
            jobs.append(Job(str(path), len(examples), tuple(kept)))
            examples.extend(Example(_class_name(c), _script(c), splits[c], path.stem) for c in kept)
        return Plan(
            tuple(examples),
            tuple(jobs),
            dropped_classes={
                "fewer examples than the minimum": tuple(map(_class_name, rare)),
                "more diacritics than max_marks": tuple(map(_class_name, marked)),
            },
            similarity=DRAWINGS_ALIKE,
            facts={"typefaces": len(files), "packages": self.config.packages, **_renderer()},
        )

    def draw(self, job: Job) -> Drawn:
        """Draw one typeface's characters."""
        pen = _Pen(job.source, self.frame.image_size, self.config.em_share)
        missing = pen.draw("\U0010ffff")
        pictures: list[Pixels] = []
        kept: list[int] = []
        refused: dict[int, str] = {}
        for position, character in enumerate(job.items):
            picture = pen.draw(character)
            if picture is None:
                refused[position] = "the drawing is blank"
            elif missing is not None and np.array_equal(picture, missing):
                refused[position] = "the typeface draws its missing-glyph box"
            else:
                pictures.append(picture)
                kept.append(position)
        shape = (-1, 1, self.frame.image_size, self.frame.image_size)
        grey = np.array(pictures, dtype=np.uint8).reshape(shape)
        return Drawn(np.repeat(grey, self.frame.channels, axis=1), tuple(kept), refused)

    def _letters(self, path: Path) -> tuple[str, ...]:
        from fontTools.ttLib import TTFont

        scripts = {*self.config.train_scripts, *self.config.test_scripts}
        with TTFont(path, lazy=True) as font:
            characters = font.getBestCmap() or {}
        return tuple(
            chr(code)
            for code, glyph in sorted(characters.items())
            if glyph != ".notdef"
            and unicodedata.category(chr(code)) in _LETTERS
            and _script(chr(code)) in scripts
        )

    def _splits(self, characters: list[str]) -> dict[str, Split]:
        training = [c for c in characters if _script(c) in self.config.train_scripts]
        names = {_class_name(c): c for c in training}
        held = hold_out(names, round(self.config.val_share * len(names)), seed=self.frame.seed)
        splits: dict[str, Split] = dict.fromkeys(characters, "test")
        splits.update({c: "val" if name in held else "train" for name, c in names.items()})
        return splits


def _num_marks(character: str) -> int:
    """Diacritics of a letter: what its canonical decomposition holds beside the base letter."""
    return len(unicodedata.normalize("NFD", character)) - 1


class _Pen:
    """One typeface at one size."""

    def __init__(self, path: str, image_size: int, em_share: float) -> None:
        from PIL import ImageFont

        self._side = image_size * _SUPERSAMPLING
        self._margin = round(_MARGIN * self._side)
        self._font = ImageFont.truetype(
            path, round(em_share * self._side), layout_engine=ImageFont.Layout.BASIC
        )

    def draw(self, character: str) -> Pixels | None:
        """Dark on white [H, W]: on the baseline, centred sideways, shrunk only if too big."""
        from PIL import Image

        mask, (_, top) = self._font.getmask2(character, mode="L", anchor="ls")
        if mask.getbbox() is None:
            return None
        left, upper, right, lower = mask.getbbox()
        ink = Image.frombytes("L", mask.size, bytes(mask)).crop((left, upper, right, lower))
        room = self._side - 2 * self._margin
        if max(ink.size) > room:
            shrink = room / max(ink.size)
            ink = ink.resize(
                (max(1, round(ink.width * shrink)), max(1, round(ink.height * shrink))),
                Image.Resampling.BOX,
            )
        y = round(_BASELINE * self._side) + top + upper
        y = min(max(y, self._margin), self._side - self._margin - ink.height)
        page = Image.new("L", (self._side, self._side), 0)
        page.paste(ink, ((self._side - ink.width) // 2, y))
        small = 255 - np.asarray(page.reduce(_SUPERSAMPLING), dtype=np.uint8)
        return None if small.min() > _FAINTEST else small


def _typefaces(packages: dict[str, str]) -> Iterator[Path]:
    """One file per typeface: where a package has it as .ttf and as .otf, the .ttf."""
    for package, wanted in sorted(packages.items()):
        found: dict[str, Path] = {}
        for path in _package_files(package, wanted):
            suffixes = _SUFFIXES.index(path.suffix.lower())
            if path.stem not in found or suffixes < _SUFFIXES.index(
                found[path.stem].suffix.lower()
            ):
                found[path.stem] = path
        if not found:
            raise DataError(
                f"package {package} {wanted} holds no typefaces. Take it out of "
                "preprocess.glyphs.packages."
            )
        yield from found.values()


def _package_files(package: str, wanted: str) -> Iterator[Path]:
    mend = f"Run `pip install {package}=={wanted}`"
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise DataError(
            f"the typefaces of package {package} are not installed. {mend}, or take it out of "
            "preprocess.glyphs.packages."
        ) from None
    if distribution.version != wanted:
        raise DataError(
            f"package {package} is installed as {distribution.version}, and "
            f"preprocess.glyphs.packages asks for {wanted}: other versions draw other pictures. "
            f"{mend}, or change the version there."
        )
    for file in distribution.files or ():
        if Path(file).suffix.lower() not in _SUFFIXES:
            continue
        if package == "matplotlib" and not file.name.startswith(_MATPLOTLIB_PREFIXES):
            continue
        yield Path(str(distribution.locate_file(file)))


def _script(character: str) -> str:
    return unicodedata.name(character, "UNKNOWN").split()[0]


def _class_name(character: str) -> str:
    return f"U+{ord(character):04X} {unicodedata.name(character)}"


def _renderer() -> dict[str, str]:
    import PIL
    from PIL import features

    return {"pillow": PIL.__version__, "freetype": str(features.version("freetype2"))}
