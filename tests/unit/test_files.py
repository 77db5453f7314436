from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.core.errors import ArtefactError
from pipeline.core.files import MANIFEST, new_folder, read_json, verify, write_bytes, write_json


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    with new_folder(tmp_path / "folder", kind="thing") as building:
        (building / "a.bin").write_bytes(bytes(range(256)))
        (building / "sub").mkdir()
        (building / "sub" / "b.txt").write_text("hello")
    return tmp_path / "folder"


def test_a_sealed_folder_verifies_and_says_what_it_is(sealed: Path) -> None:
    manifest = verify(sealed)
    assert manifest["kind"] == "thing"
    assert set(manifest["files"]) == {"a.bin", "sub/b.txt"}


@pytest.mark.parametrize("byte", [0, 17, 255])
def test_every_flipped_byte_is_seen(sealed: Path, byte: int) -> None:
    content = bytearray((sealed / "a.bin").read_bytes())
    content[byte] ^= 1
    (sealed / "a.bin").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"a\.bin was altered"):
        verify(sealed)


def test_the_manifest_vouches_for_itself(sealed: Path) -> None:
    """Every single-bit flip in it is seen, in its header and in its white space too."""
    path = sealed / MANIFEST
    clean = path.read_bytes()
    for position in range(len(clean)):
        for bit in (0, 2, 5):
            content = bytearray(clean)
            content[position] ^= 1 << bit
            path.write_bytes(content)
            with pytest.raises(ArtefactError):
                verify(sealed)


def test_other_damage_is_named(sealed: Path) -> None:
    (sealed / "extra").write_text("x")
    with pytest.raises(ArtefactError, match="does not know.*extra"):
        verify(sealed)
    (sealed / "extra").unlink()
    os.truncate(sealed / "a.bin", 100)
    with pytest.raises(ArtefactError, match=r"a\.bin has the wrong size"):
        verify(sealed)
    (sealed / "a.bin").unlink()
    with pytest.raises(ArtefactError, match=r"a\.bin is missing"):
        verify(sealed)
    (sealed / "a.bin").symlink_to("/etc/hostname")
    with pytest.raises(ArtefactError, match="link"):
        verify(sealed)
    (sealed / MANIFEST).unlink()
    with pytest.raises(ArtefactError, match="never finished"):
        verify(sealed)


def test_a_failed_body_leaves_the_old_folder_and_no_rest(sealed: Path) -> None:
    before = verify(sealed)
    with pytest.raises(RuntimeError, match="half way"), new_folder(sealed) as building:
        (building / "a.bin").write_bytes(b"new")
        raise RuntimeError("half way")
    assert verify(sealed) == before
    assert [p.name for p in sealed.parent.iterdir()] == ["folder"]


def test_a_folder_is_replaced_whole(sealed: Path) -> None:
    with new_folder(sealed, kind="other") as building:
        (building / "c").write_text("new")
    assert set(verify(sealed)["files"]) == {"c"}
    assert [p.name for p in sealed.parent.iterdir()] == ["folder"]


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "value.json"
    write_json(target, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(target, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_bytes(target, "text")  # type: ignore[arg-type]
    assert read_json(target) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_unreadable_json_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"x\.json is damaged.*dvc repro"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ArtefactError, match="does not exist"):
        read_json(tmp_path / "y.json")
