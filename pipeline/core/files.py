"""Files that are either whole or absent, and folders whose every byte is vouched for."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.errors import ArtefactError

MANIFEST = "manifest.json"
_OWN_HASH = "manifest_sha256"


def sha256_bytes(content: bytes) -> str:
    """Hex SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """JSON that is the same text for the same value: sorted keys, two spaces, final newline."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: str | Path) -> Any:
    """Parse a JSON file.

    Raises:
        ArtefactError: it is missing or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(
            f"{path} does not exist. Run the stage that makes it (`dvc repro`)."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path} is damaged: {error}. Delete it and run `dvc repro`.") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write canonical JSON, whole or not at all."""
    write_bytes(Path(path), canonical_json(value).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file's content; a reader, or a crash, sees the old bytes or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_folder(target: Path, **header: Any) -> Iterator[Path]:
    """Build a folder beside `target`, seal it, and rename it into place.

    The body writes into the folder that it is given. On leaving, every file is synced, its size
    and SHA-256 go into `manifest.json` (written last, with `header` beside the file list), and the
    folder replaces `target`. If the body raises, `target` is as it was; a process that dies leaves
    it as it was, new, or (between renames) absent, never in parts.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*-*"):
        shutil.rmtree(leftover)  # of a process that was killed: a folder has one writer at a time
    building = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.building-"))
    os.chmod(building, 0o755)
    try:
        yield building
        seal(building, **header)
        if target.exists():
            old = building.with_name(building.name.replace("building", "old"))
            os.replace(target, old)
            os.replace(building, target)
            shutil.rmtree(old)
        else:
            os.replace(building, target)
        fsync_folder(target.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def seal(folder: Path, **header: Any) -> None:
    """Write the manifest of a folder: header keys, then every file with its size and SHA-256."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[path.relative_to(folder).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        fsync_folder(path)
    manifest = {**header, "files": files}
    own = sha256_bytes(canonical_json(manifest).encode())
    write_json(folder / MANIFEST, {**manifest, _OWN_HASH: own})


def verify(folder: Path, *, later: str | None = None) -> dict[str, Any]:
    """Check every byte of a sealed folder before anything in it is parsed; return the manifest.

    Args:
        later: pattern of names whose hashes the caller takes before it uses them; they are only
            looked for and measured here.

    Raises:
        ArtefactError: a file is missing, extra, a link, or not the bytes that were sealed.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise ArtefactError(f"{folder} is not a folder. Run the stage that makes it (`dvc repro`).")
    manifest_path = folder / MANIFEST
    if manifest_path.is_symlink() or not manifest_path.is_file():
        raise ArtefactError(f"{folder} has no {MANIFEST}: it was never finished. Make it again.")
    manifest = _read_manifest(manifest_path)
    files = manifest["files"]
    present = set()
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtefactError(
                f"{path} is a link or a device; a sealed folder holds plain files. Remove it."
            )
        if path.is_file() and path != manifest_path:
            present.add(path.relative_to(folder).as_posix())
    if extra := sorted(present - set(files)):
        raise ArtefactError(
            f"{folder} holds files that its manifest does not know: {extra[:5]}. Remove them."
        )
    try:
        for name, entry in sorted(files.items()):
            _verify_file(folder, name, entry, present, later)
    except FileNotFoundError as error:
        raise ArtefactError(
            f"{error.filename} went away while it was read: another process replaces {folder}. "
            "Wait for it, then run the same command again."
        ) from None
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    """A manifest that vouches for itself too: the hash of its bytes without that hash's own line.

    Not by writing it anew and comparing: for half a million classes that takes seconds.
    """
    try:
        rest, own = _without_own_hash(path.read_bytes())
    except FileNotFoundError:
        raise ArtefactError(
            f"{path} does not exist. Run the stage that makes it (`dvc repro`)."
        ) from None
    if own != sha256_bytes(rest).encode():
        raise ArtefactError(
            f"{path} was altered: its own SHA-256 is not the recorded one. Restore it "
            "(`dvc checkout`) or make it again (`dvc repro`)."
        )
    try:
        manifest = json.loads(rest)
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ArtefactError(f"{path} is not a manifest. Make the folder again.")
    return manifest


def _without_own_hash(content: bytes) -> tuple[bytes, bytes]:
    """What the hash was taken of, and the hash; the whole and nothing if it is not in its place."""
    head, mark, tail = content.partition(f'\n  "{_OWN_HASH}": "'.encode())
    own, end = tail[:64], tail[64:]
    if mark and end.startswith(b'",\n'):
        return head + end[2:], own
    if (
        mark and end == b'"\n}\n' and head.endswith(b",")
    ):  # the last key: it has the comma before it
        return head[:-1] + end[1:], own
    return content, b""


def _verify_file(
    folder: Path, name: str, entry: dict[str, Any], present: set[str], later: str | None
) -> None:
    mend = "Restore it (`dvc checkout`) or make it again (`dvc repro`)."
    if name not in present:
        raise ArtefactError(f"{folder / name} is missing. {mend}")
    if (folder / name).stat().st_size != entry.get("bytes"):
        raise ArtefactError(f"{folder / name} has the wrong size: cut short or altered. {mend}")
    if later is not None and fnmatch.fnmatchcase(name, later):
        return
    if sha256_file(folder / name) != entry.get("sha256"):
        raise ArtefactError(
            f"{folder / name} was altered: its SHA-256 is not the recorded one. {mend}"
        )
