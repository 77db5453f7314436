"""Three nights of new data, to try `metaloom retrain` with.

    python -m examples.nights begin FOLDER      pictures of ten letters; params.yaml set for them
    python -m examples.nights more FOLDER       fifty more letters to learn from
    python -m examples.nights poison FOLDER     more pictures, and every training label wrong

Pictures are characters drawn by the typefaces that come with matplotlib, each a little turned and
moved: Latin letters to train on, Greek ones to validate on, Cyrillic ones to test on.
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SIDE = 28
_COPIES = 2
_FACES = (
    *(f"DejaVuSans{kind}" for kind in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{kind}" for kind in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{kind}" for kind in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{kind}" for kind in ("", "Bol", "Italic", "BolIta")),
)
_FIRST = "oceasnmuvx"
_TRAIN = string.ascii_letters + string.digits
_VAL = "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπστφψω"
_TEST = "БГДЖЗИЙЛПУФЦЧШЩЪЫЬЭЮЯбвгджзийклмнптфцчшщъыьэюя"
SETTINGS: dict[str, Any] = {
    "preprocess": {"domain": "image_folder", "source": "data/raw/letters"},
    "sample_tasks": {
        "train": {"ways": 10},
        "val": {"ways": [5], "shots": [1], "queries": 5, "episodes": 60},
        "test": {"ways": [5], "shots": [1], "queries": 10, "episodes": 300},
    },
    "pretrain": {
        "candidates": ["conv4"],
        "conv4": {"width": 32},
        "outer": {"num_steps": 100, "validate_every": 50, "checkpoint_every": 20},
    },
    "meta_train": {"outer": {"num_steps": 100, "validate_every": 25, "checkpoint_every": 10}},
    "evaluate": {"baselines": ["pixels", "untrained"], "example_episodes": 1},
    "deploy": {
        "gate": {"max_calibration_error": 0.2, "max_drops": [0.3, 0.6, 0.8]},
        "robustness": {"num_episodes": 30},
    },
}
"""A run of a minute or two on a laptop; everything else is as in params.yaml."""


def draw(character: str, face: str, *, seed: int) -> Image.Image:
    """One black character on white, turned by up to 10 degrees and moved by up to 2 pixels."""
    import matplotlib

    rng = np.random.default_rng(seed)
    path = Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{face}.ttf"
    font = ImageFont.truetype(str(path), int(rng.integers(17, 23)))
    picture = Image.new("L", (_SIDE, _SIDE), 255)
    left, top, right, bottom = font.getbbox(character)
    x, y = (_SIDE - right - left) / 2, (_SIDE - bottom - top) / 2
    moved = rng.uniform(-2, 2, 2)
    ImageDraw.Draw(picture).text((x + moved[0], y + moved[1]), character, 0, font)
    return picture.rotate(float(rng.uniform(-10, 10)), Image.Resampling.BILINEAR, fillcolor=255)


def write(folder: Path, split: str, characters: str, *, first: int = 0, wrong: bool = False) -> int:
    """Draw characters into `folder/split/<code point>/`; returns how many pictures.

    Args:
        first: number of the first copy of each typeface's drawing.
        wrong: put every picture into another character's folder.
    """
    count = 0
    for character in characters:
        for number, face in enumerate(_FACES):
            for copy in range(first, first + _COPIES):
                seed = 1000 * ord(character) + 10 * number + copy
                shift = 1 + seed * 7919 % (len(characters) - 1) if wrong else 0
                label = characters[(characters.index(character) + shift) % len(characters)]
                place = folder / split / f"u{ord(label):04x}"
                place.mkdir(parents=True, exist_ok=True)
                name = f"{ord(character):04x}-{face}-{copy}.png"
                draw(character, face, seed=seed).save(place / name)
                count += 1
    return count


def set_up(params: Path) -> None:
    """Write SETTINGS into params.yaml, and leave its comments alone."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 110
    document = yaml.load(params)
    _merge(document, SETTINGS)
    yaml.dump(document, params)


def _merge(document: Any, settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(value, dict):
            _merge(document[key], value)
        else:
            document[key] = value


def main() -> None:
    """Draw one night's pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("night", choices=["begin", "more", "poison"])
    parser.add_argument("folder", type=Path, help="where the pictures are kept")
    options = parser.parse_args()
    if options.night == "begin":
        count = write(options.folder, "train", _FIRST)
        count += write(options.folder, "val", _VAL) + write(options.folder, "test", _TEST)
        set_up(Path("params.yaml"))
    elif options.night == "more":
        count = write(options.folder, "train", "".join(c for c in _TRAIN if c not in _FIRST))
    else:
        for path in sorted((options.folder / "train").rglob("*.png")):
            path.unlink()
        count = write(options.folder, "train", _TRAIN, wrong=True)
        count += write(options.folder, "train", _TRAIN, first=_COPIES, wrong=True)
    print(f"{count:,} pictures in {options.folder}")


if __name__ == "__main__":
    main()
