"""Zip files from strangers: members are listed and read in memory, never unpacked to disk."""

from __future__ import annotations

import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.core.errors import DataError


@dataclass(frozen=True)
class ArchiveLimits:
    """Bounds on what a zip may hold."""

    max_entries: int = 2_000_000
    max_bytes: int = 64_000_000_000
    """Of all members, unpacked."""
    max_member_bytes: int = 100_000_000
    max_ratio: int = 200
    """Unpacked size over packed size, of all members that are not tiny."""


class SafeZip:
    """A zip whose every name and size was checked when it was opened."""

    def __init__(self, path: Path, limits: ArchiveLimits | None = None) -> None:
        self._path = path
        self._limits = limits or ArchiveLimits()
        try:
            self._file = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise DataError(
                f"{path} does not exist. Put it there, or mend preprocess.source."
            ) from None
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise _refusal(path, f"cannot be read as a zip: {error}") from None
        try:
            self._members = {m.filename: m for m in self._checked()}
        except BaseException:
            self._file.close()
            raise

    def names(self) -> list[str]:
        """Names of the members that are files, sorted."""
        return sorted(self._members)

    def read(self, name: str) -> bytes:
        """One member's bytes, at most as many as its checked header says.

        Raises:
            DataError: it is damaged.
        """
        member = self._members[name]
        try:
            with self._file.open(member) as file:
                content = file.read(member.file_size + 1)
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError,
                NotImplementedError) as error:  # fmt: skip
            raise _refusal(self._path, f"member {name!r} is damaged: {error}") from None
        if len(content) != member.file_size:
            raise _refusal(self._path, f"member {name!r} is not as long as its header says")
        return content

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _checked(self) -> Iterator[zipfile.ZipInfo]:
        members = self._file.infolist()
        limits, total, seen = self._limits, 0, set()
        if len(members) > limits.max_entries:
            raise _refusal(self._path, f"holds more than {limits.max_entries} entries")
        for member in members:
            _check_member(self._path, member, limits)
            folded = member.filename.rstrip("/")
            if folded in seen:
                raise _refusal(self._path, f"holds {member.filename!r} twice")
            seen.add(folded)
            total += member.file_size
            if total > limits.max_bytes:
                raise _refusal(self._path, f"unpacks to more than {limits.max_bytes} bytes")
            if not member.is_dir():
                yield member


@contextmanager
def open_zip(path: Path, limits: ArchiveLimits | None = None) -> Iterator[SafeZip]:
    """Open a zip for the length of a block.

    Raises:
        DataError: it is no zip, or holds links, devices, names that lead outside, or too much.
    """
    archive = SafeZip(path, limits)
    try:
        yield archive
    finally:
        archive.close()


def _check_member(path: Path, member: zipfile.ZipInfo, limits: ArchiveLimits) -> None:
    name = member.orig_filename
    mode = member.external_attr >> 16
    kind = stat.S_IFMT(mode)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _refusal(path, f"holds a link or device: {name!r}")
    if (
        not name
        or "\0" in name
        or "\\" in name
        or PurePosixPath(name).is_absolute()
        or name[1:2] == ":"
        or ".." in PurePosixPath(name).parts
        or len(name.encode("utf-8", "surrogateescape")) > 1024
    ):
        raise _refusal(path, f"holds a name that leads elsewhere: {name[:80]!r}")
    if member.flag_bits & 0x1:
        raise _refusal(path, f"holds an encrypted member: {name!r}")
    if member.file_size > limits.max_member_bytes:
        raise _refusal(path, f"holds a member of {member.file_size} bytes: {name!r}")
    if member.file_size > max(limits.max_ratio * member.compress_size, 4096):
        raise _refusal(path, f"holds a member that unpacks too far: {name!r}")


def _refusal(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}. Nothing of it was used; get a sound copy of the archive.")
