"""Where picture files lie: a folder or a zip, listed without trust and read by name.

Names inside a source are relative, with `/` between their parts.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline.core.errors import DataError
from pipeline.domains.archives import SafeZip
from pipeline.domains.base import Drawn, Frame, Job, Pixels
from pipeline.domains.pictures import Limits, PictureRefused, decode_picture

_MAGIC = (b"\x89PNG", b"\xff\xd8\xff")
"""The first bytes of a PNG and of a JPEG."""


@dataclass(frozen=True)
class Listing:
    """What a source holds."""

    files: tuple[str, ...]
    """Plain files, sorted; hidden ones and links out of the source are not among them."""
    empty_folders: tuple[str, ...] = ()
    dropped: dict[str, list[str]] = field(default_factory=dict)
    """Names left out, by reason."""


def list_source(source: Path) -> Listing:
    """List a folder or a zip.

    Raises:
        DataError: it does not exist or is neither.
    """
    if source.is_dir():
        return _list_folder(source)
    if source.suffix.lower() == ".zip":
        names = _open_archive(str(source)).names()
        hidden = [name for name in names if _is_hidden(name)]
        files = tuple(name for name in names if not _is_hidden(name))
        return Listing(files, dropped={"hidden file": hidden} if hidden else {})
    raise DataError(
        f"{source} is neither a folder nor a zip. Put the raw data there, or set "
        "preprocess.source to where they are."
    )


def inner_archive(source: Path, files: tuple[str, ...]) -> str | None:
    """The name of the zip that holds a folder's pictures, if no picture lies outside it.

    Args:
        files: of the source.

    Raises:
        DataError: there are several such zips.
    """
    if not source.is_dir():
        return None
    zips = [name for name in files if name.lower().endswith(".zip")]
    if not zips or any(_begins_as_picture(source, name) for name in files if name not in zips):
        return None
    if len(zips) > 1:
        named = ", ".join(printable(name) for name in zips[:5])
        raise DataError(
            f"{source} holds no pictures, and {len(zips)} zips: {named}. Set preprocess.source to "
            "one of them, or unpack them into one folder."
        )
    return zips[0]


def read_file(source: Path, name: str, *, max_bytes: int) -> bytes:
    """A file's bytes, at most one more than `max_bytes`: enough to see that it is too big.

    Raises:
        DataError: it cannot be read, is no plain file, or lies outside the source.
    """
    if source.is_file():
        return _open_archive(str(source)).read(name)
    root = source.resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise PictureRefused("outside the source", "Copy it into the source.")
    try:
        # neither a link put there meanwhile nor a pipe may hold us up
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise PictureRefused("not a plain file", "Remove it.")
            return file.read(max_bytes + 1)
    except FileNotFoundError:
        raise PictureRefused("the file does not exist", "Mend the list or add it.") from None
    except OSError:
        raise PictureRefused("the file cannot be read", "Mend its permissions.") from None


def draw_files(
    job: Job,
    frame: Frame,
    limits: Limits,
    *,
    name_of: Callable[[str], str] = str,
    change: Callable[[str, Pixels], Pixels] = lambda _, pixels: pixels,
) -> Drawn:
    """Decode a job's files.

    Args:
        name_of: the file's name in an item; files named twice in a row are decoded once.
        change: what to do with a decoded picture, given its item.
    """
    pictures: list[Pixels] = []
    kept: list[int] = []
    refused: dict[int, str] = {}
    converted: dict[int, tuple[str, ...]] = {}
    decode = lru_cache(maxsize=1)(lambda name: _decode_file(job.source, name, frame, limits))
    for position, item in enumerate(job.items):
        outcome = decode(name_of(item))
        if isinstance(outcome, str):
            refused[position] = outcome
            continue
        pixels, conversions = outcome
        pictures.append(change(item, pixels))
        kept.append(position)
        if conversions:
            converted[position] = conversions
    shape = (-1, frame.channels, frame.image_size, frame.image_size)
    stacked = np.array(pictures, dtype=np.uint8).reshape(shape)
    return Drawn(stacked, tuple(kept), refused, converted)


def printable(name: str) -> str:
    """A name as valid text: bytes that are no UTF-8, and control characters, written as escapes."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def odd_names(files: tuple[str, ...]) -> list[str]:
    """Names that trip other programs: not printable UTF-8, or a part that begins with a dash."""
    return [
        name
        for name in files
        if printable(name) != name or any(part.startswith("-") for part in name.split("/"))
    ]


def _begins_as_picture(source: Path, name: str) -> bool:
    try:
        return read_file(source, name, max_bytes=8).startswith(_MAGIC)
    except PictureRefused:
        return False


def _decode_file(
    source: str, name: str, frame: Frame, limits: Limits
) -> tuple[Pixels, tuple[str, ...]] | str:
    try:
        content = read_file(Path(source), name, max_bytes=limits.max_bytes)
        decoded = decode_picture(
            content, size=frame.image_size, channels=frame.channels, limits=limits
        )
    except PictureRefused as refusal:
        return refusal.reason
    except DataError:
        return "damaged in its archive"
    return decoded.pixels, decoded.conversions


@lru_cache(maxsize=4)
def _open_archive(path: str) -> SafeZip:
    """Checked once in each process."""
    return SafeZip(Path(path))


def _list_folder(root: Path) -> Listing:
    files: list[str] = []
    empty: list[str] = []
    dropped: dict[str, list[str]] = defaultdict(list)
    resolved = root.resolve()
    for folder, subfolders, names in os.walk(root, followlinks=False):
        subfolders.sort()
        relative = Path(folder).relative_to(root)
        if not subfolders and not names and folder != str(root):
            empty.append(relative.as_posix())
        for name in list(subfolders):
            if name.startswith(".") or (Path(folder) / name).is_symlink():
                subfolders.remove(name)
                reason = "hidden folder" if name.startswith(".") else "link to a folder"
                dropped[reason].append((relative / name).as_posix())
        for name in names:
            refusal = _why_not(Path(folder) / name, resolved)
            (dropped[refusal] if refusal else files).append((relative / name).as_posix())
    return Listing(
        tuple(sorted(files)), tuple(sorted(empty)), {k: sorted(v) for k, v in dropped.items()}
    )


def _why_not(path: Path, root: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden file"
    try:
        if path.is_symlink() and not path.resolve(strict=True).is_relative_to(root):
            return "link out of the source"
        if not stat.S_ISREG(path.stat().st_mode):
            return "not a plain file"
    except (OSError, RuntimeError):
        return "broken link"
    return None


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
