"""Characters drawn in typefaces: which ones, how, and from which packages."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.errors import DataError
from pipeline.domains.base import Frame
from pipeline.domains.glyphs import Glyphs, GlyphsConfig

SOME = {"font-caladea": "0.0.2", "font-roboto": "0.0.1", "font-source-sans-pro": "0.0.1"}


def domain(minimum: int = 10, size: int = 28, seed: int = 0, **config: object) -> Glyphs:
    frame = Frame(Path(), image_size=size, channels=1, min_examples=minimum, seed=seed)
    return Glyphs(GlyphsConfig(**{"packages": SOME, **config}), frame)


def draw(glyphs: Glyphs, typeface: str, characters: str) -> list[np.ndarray | None]:
    job = next(j for j in glyphs.plan().jobs if Path(j.source).stem == typeface)
    drawn = glyphs.draw(type(job)(job.source, 0, tuple(characters)))
    pictures = dict(zip(drawn.kept, drawn.pixels[:, 0], strict=True))
    return [pictures.get(i) for i in range(len(characters))]


def test_scripts_decide_the_split() -> None:
    examples = domain().plan().examples
    scripts = {split: {e.group for e in examples if e.split == split} for split in
               ("train", "val", "test")}  # fmt: skip
    assert scripts == {"train": {"LATIN"}, "val": {"LATIN"}, "test": {"GREEK", "CYRILLIC"}}
    names = {split: {e.class_name for e in examples if e.split == split} for split in scripts}
    assert not names["train"] & names["val"]
    share = len(names["val"]) / len(names["val"] | names["train"])
    assert share == pytest.approx(0.15, abs=0.005)


def test_held_out_characters_hang_on_the_seed() -> None:
    held = [
        {e.class_name for e in domain(seed=s).plan().examples if e.split == "val"} for s in (0, 1)
    ]
    assert held[0] != held[1]


def test_every_class_is_a_letter_of_its_script_with_enough_typefaces() -> None:
    plan = domain().plan()
    typefaces: dict[str, set[str]] = {}
    for example in plan.examples:
        code, _, name = example.class_name.partition(" ")
        character = chr(int(code.removeprefix("U+"), 16))
        assert unicodedata.name(character) == name
        assert character.isalpha()
        typefaces.setdefault(example.class_name, set()).add(example.name)
    assert min(map(len, typefaces.values())) >= 10
    assert len(plan.examples) == sum(map(len, typefaces.values()))


def test_a_typeface_in_two_formats_is_one_typeface() -> None:
    """Source Sans comes as .ttf and as .otf: support and query would hold the same outlines."""
    sources = [Path(job.source) for job in domain().plan().jobs]
    assert len({path.stem for path in sources}) == len(sources)
    assert {path.suffix for path in sources if path.stem.startswith("SourceSans")} == {".ttf"}


def test_ink_is_dark_on_white_and_stands_on_the_line() -> None:
    """A, n and o stand on the baseline (o by its overshoot below); p and g reach below it."""
    bottoms = {}
    for character, picture in zip("Anopg", draw(domain(), "Roboto-Regular", "Anopg"), strict=True):
        assert picture is not None
        ink = np.flatnonzero((picture < 128).any(axis=1))
        columns = np.flatnonzero((picture < 128).any(axis=0))
        bottoms[character] = int(ink[-1])
        assert abs((columns[0] + columns[-1]) / 2 - 13.5) <= 1  # centred
        assert picture[0].min() == 255 and picture[-1].min() == 255
    assert bottoms["A"] == bottoms["n"]
    assert bottoms["o"] - bottoms["n"] in (0, 1)
    assert min(bottoms["p"], bottoms["g"]) - bottoms["n"] >= 3


def test_everything_fits_the_picture() -> None:
    for picture in draw(domain(), "Roboto-Black", "ǼỜЩ\u01c4Ậ"):
        assert picture is not None
        frame = [picture[0], picture[-1], picture[:, 0], picture[:, -1]]
        assert min(int(side.min()) for side in frame) == 255


def test_blank_and_missing_characters_are_refused_with_a_reason() -> None:
    glyphs = domain()
    job = glyphs.plan().jobs[0]
    drawn = glyphs.draw(type(job)(job.source, 0, ("A", " ", "\U00012000")))
    assert drawn.kept == (0,)
    assert drawn.refused[1] == "the drawing is blank"
    assert "missing-glyph" in drawn.refused[2] or "blank" in drawn.refused[2]


def test_a_package_that_is_not_there_or_of_another_version_says_how_to_mend_it() -> None:
    with pytest.raises(DataError, match=r"pip install font-no-such==1\.0"):
        domain(packages={"font-no-such": "1.0"}).plan()
    with pytest.raises(DataError, match=r"installed as 0\.0\.1, .* asks for 9\.9"):
        domain(packages={"font-roboto": "9.9"}).plan()
    with pytest.raises(DataError, match=r"numpy .* holds no typefaces"):
        domain(packages={"numpy": np.__version__}).plan()
