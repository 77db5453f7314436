"""An object store, or a mounted disk, as a place for sealed folders."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.core.errors import ArtefactError, ConfigError, StorageError
from pipeline.core.files import MANIFEST, fsync_folder, verify


class _StoreError(OSError):
    """The store's error, not one of the disk that its files are written to."""


class Storage:
    """One place in an object store (or on a mounted disk): folders by name, whole or absent.

    A folder's manifest is uploaded last and removed first, so one that has a manifest is whole.
    """

    def __init__(self, uri: str) -> None:
        """Nothing is asked of the store yet.

        Raises:
            ConfigError: no such kind of address.
        """
        import pyarrow as pa
        from pyarrow import fs

        self.uri = uri.rstrip("/")
        try:
            if uri.startswith("s3://"):
                self.filesystem, self.base = _s3(fs), uri.removeprefix("s3://").rstrip("/")
            else:
                self.filesystem, self.base = fs.FileSystem.from_uri(self.uri)
            if not self.base.strip("/"):
                raise OSError("it names no place")
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(
                f"METALOOM_STORAGE is {uri!r}: {error}. Set it to s3://bucket/path or file:///path."
            ) from None

    def names(self, under: str) -> list[str]:
        """Whole folders directly below a path, sorted."""
        return [name for name, whole in self.folders(under).items() if whole]

    def folders(self, under: str) -> dict[str, bool]:
        """All folders directly below a path, sorted, and whether each is whole."""
        from pyarrow import fs

        base = f"{self.base}/{under}"
        selector = fs.FileSelector(base, recursive=True, allow_not_found=True)
        found = {
            PurePosixPath(i.path).relative_to(base).parts
            for i in self.filesystem.get_file_info(selector)
        }
        return {name: (name, MANIFEST) in found for name in sorted({parts[0] for parts in found})}

    def put(self, folder: Path, name: str) -> None:
        """Upload a sealed folder; if it is there already, by its manifest, it is left as it is."""
        target = f"{self.base}/{name}"
        there = self._manifest(name)
        if there == (folder / MANIFEST).read_bytes():
            return
        if there is not None:  # torn, or another's
            self.remove(name)
        self.filesystem.create_dir(target, recursive=True)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        for path in sorted(files, key=lambda p: p.name == MANIFEST):
            relative = path.relative_to(folder)
            if relative.parent != Path("."):
                self.filesystem.create_dir(f"{target}/{relative.parent.as_posix()}", recursive=True)
            with (
                path.open("rb") as source,
                self.filesystem.open_output_stream(f"{target}/{relative.as_posix()}") as sink,
            ):
                shutil.copyfileobj(source, sink, 2**20)

    def _manifest(self, name: str) -> bytes | None:
        from pyarrow import fs

        path = f"{self.base}/{name}/{MANIFEST}"
        if self.filesystem.get_file_info(path).type != fs.FileType.File:
            return None
        with self.filesystem.open_input_stream(path) as source:
            content: bytes = source.read()
            return content

    def get(self, name: str, target: Path, check: Callable[[Path], object] = verify) -> None:
        """Download a folder, check every byte, and put it in place.

        Args:
            check: of the downloaded folder, before it is in its place.

        Raises:
            ArtefactError: it is not what was uploaded.
            StorageError: the disk of this machine refuses; of the store it is an OSError.
        """
        try:
            self._download(f"{self.base}/{name}", target, check)
        except _StoreError:
            raise
        except OSError as error:
            raise StorageError(
                f"cannot write {target}, a copy of {self.uri}/{name}: {error}. Free some space or "
                "mend the disk, then run the same command again."
            ) from error

    def _download(self, base: str, target: Path, check: Callable[[Path], object]) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.fetched-"))
        try:
            os.chmod(scratch, 0o755)
            for found in self._files(base):
                inside = PurePosixPath(found).relative_to(base)
                if ".." in inside.parts:  # a store takes any name
                    raise ArtefactError(
                        f"{self.uri} holds {found!r}, which would lie outside its folder. Nobody "
                        "of ours wrote it: find out who did, and remove it."
                    )
                path = scratch / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as sink:
                    sink.writelines(self._pieces(found))
                    sink.flush()
                    os.fsync(sink.fileno())
            check(scratch)
            if target.exists():
                shutil.rmtree(target)
            os.replace(scratch, target)
            fsync_folder(target.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _files(self, base: str) -> list[str]:
        from pyarrow import fs

        with _asking():
            found = self.filesystem.get_file_info(fs.FileSelector(base, recursive=True))
        return [info.path for info in found if info.type == fs.FileType.File]

    def _pieces(self, path: str) -> Iterator[bytes]:
        with _asking(), self.filesystem.open_input_stream(path) as source:
            while piece := source.read(2**20):
                yield piece

    def remove(self, name: str) -> None:
        """Remove a folder, whole or torn, its manifest first."""
        from pyarrow import fs

        base = f"{self.base}/{name}"
        manifest, folder = self.filesystem.get_file_info([f"{base}/{MANIFEST}", base])
        if manifest.type == fs.FileType.File:
            self.filesystem.delete_file(manifest.path)
        if folder.type == fs.FileType.Directory:
            self.filesystem.delete_dir(base)


@contextmanager
def _asking() -> Iterator[None]:
    """Whatever fails in here is the store's fault."""
    try:
        yield
    except OSError as error:
        raise _StoreError(str(error)) from error


def storage_from_environment() -> Storage | None:
    """The place that METALOOM_STORAGE names, if it is set."""
    uri = os.environ.get("METALOOM_STORAGE", "")
    return Storage(uri) if uri else None


def _s3(fs: Any) -> Any:
    """The environment's credentials and endpoint, and waits that end in seconds, not minutes."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    scheme, _, host = (endpoint or "").rpartition("://")
    return fs.S3FileSystem(
        # Said outright, they travel with the object to processes that lack the environment.
        access_key=os.environ.get("AWS_ACCESS_KEY_ID"),
        secret_key=os.environ.get("AWS_SECRET_ACCESS_KEY"),
        session_token=os.environ.get("AWS_SESSION_TOKEN"),
        endpoint_override=host or None,
        scheme=scheme or "https",
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        connect_timeout=3,
        request_timeout=10,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
    )
