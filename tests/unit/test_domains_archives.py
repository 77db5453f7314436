"""Zip files from strangers (guarantee D5)."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from pipeline.core.errors import DataError
from pipeline.domains.archives import ArchiveLimits, open_zip


def archive(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            info = zipfile.ZipInfo(name) if isinstance(name, str) else name
            info.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(info, content)
    return buffer.getvalue()


def special(kind: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("inside/entry")
    info.create_system = 3
    info.external_attr = (kind | 0o777) << 16
    return info


def renamed(name: bytes) -> bytes:
    """An archive whose member has a name that Python itself would not write."""
    placeholder = b"x" * len(name)
    return archive((placeholder.decode(), b"content")).replace(placeholder, name)


def sizes_that_lie(content: bytes, size: int) -> bytes:
    """Promise another unpacked size in both headers."""
    damaged = bytearray(content)
    struct.pack_into("<I", damaged, 22, size)
    struct.pack_into("<I", damaged, content.index(b"PK\1\2") + 24, size)
    return bytes(damaged)


NAMES = [
    b"../escape", b"a/../../escape", b"a/b/../../../escape", b"/etc/passwd", b"//host/share",
    b"..", b"a/..", b"C:/escape", b"c:escape", b"\\escape", b"..\\escape", b"a\\..\\..\\escape",
    b"a/\0/b", b"ok.png\0../escape", b"./../escape", b"a/./../../escape",
    b"../" * 300 + b"escape", (b"d" * 200 + b"/") * 20 + b"../" * 22 + b"escape", b"n" * 1025,
]  # fmt: skip
CORPUS = {
    **{f"name {name[:24]!r}": renamed(name) for name in NAMES},
    "symbolic link": archive((special(stat.S_IFLNK), b"/etc")),
    "link, then a file through it": archive(
        (special(stat.S_IFLNK), b"/tmp"), ("inside/entry/escape", b"x")
    ),
    "character device": archive((special(stat.S_IFCHR), b"")),
    "block device": archive((special(stat.S_IFBLK), b"")),
    "pipe": archive((special(stat.S_IFIFO), b"")),
    "socket": archive((special(stat.S_IFSOCK), b"")),
    "twice the same name": archive(("aaa", b"1"), ("bbb", b"2")).replace(b"bbb", b"aaa"),
    "a file and a folder of one name": archive(("aaa", b"1"), ("bbb/", b"")).replace(b"bbb", b"aaa"),
    "bomb": archive(("zeros", b"\0" * 20_000_000)),
    "too large a member": sizes_that_lie(archive(("m", bytes(range(256)) * 9000)), 2_000_000_000),
    "no archive": b"PK\3\4 but no more",
    "empty": b"",
    "encrypted": archive(("secret", b"x")).replace(b"PK\1\2\x14\x03\x14\x00\x00\x00", b"PK\1\2\x14\x03\x14\x00\x01\x00"),
}  # fmt: skip


@pytest.mark.parametrize("case", CORPUS)
def test_a_hostile_archive_is_refused_and_writes_nothing(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.zip").write_bytes(CORPUS[case])
    with pytest.raises(DataError, match="Nothing of it was used"), open_zip(folder / "a.zip"):
        pass
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.zip", "in"]


def test_the_corpus_has_thirty_cases() -> None:
    assert len(CORPUS) >= 30


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        (ArchiveLimits(max_entries=2), "more than 2 entries"),
        (ArchiveLimits(max_bytes=29), "more than 29 bytes"),
        (ArchiveLimits(max_member_bytes=9), "member of 10 bytes"),
    ],
)
def test_bounds_are_exact(limits: ArchiveLimits, what: str, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(archive(*((f"m{i}", b"0123456789") for i in range(3))))
    with pytest.raises(DataError, match=what), open_zip(tmp_path / "a.zip", limits):
        pass
    at_the_bound = ArchiveLimits(max_entries=3, max_bytes=30, max_member_bytes=10)
    with open_zip(tmp_path / "a.zip", at_the_bound) as opened:
        assert [opened.read(name) for name in opened.names()] == [b"0123456789"] * 3


def test_damage_is_found_when_a_member_is_read(tmp_path: Path) -> None:
    content = bytearray(archive(("m", bytes(range(200)))))
    content[60] ^= 0x10
    (tmp_path / "a.zip").write_bytes(content)
    with open_zip(tmp_path / "a.zip") as opened, pytest.raises(DataError, match="'m'"):
        opened.read("m")


def test_a_size_that_lies_is_found_when_the_member_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(sizes_that_lie(archive(("m", b"x" * 2000)), 1000))
    with open_zip(tmp_path / "a.zip") as opened, pytest.raises(DataError, match="'m'"):
        opened.read("m")
