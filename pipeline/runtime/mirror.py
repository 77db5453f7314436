"""Copies of sealed folders in an object store, made beside the work that must not wait for it."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.core.errors import ArtefactError, ConfigError, StorageError
from pipeline.core.files import MANIFEST, fsync_folder, verify
from pipeline.runtime.checkpoint import (
    check_checkpoint,
    checkpoint_folders,
    clear_checkpoints,
    newest_step,
)

KEPT = 2
_POLL_SECONDS = 0.5
_LONGEST_BACKOFF = 15.0
_FLUSH_SECONDS = 20.0


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
        from pyarrow import fs

        selector = fs.FileSelector(f"{self.base}/{under}", recursive=True, allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        return sorted(
            PurePosixPath(i.path).parent.name
            for i in found
            if PurePosixPath(i.path).name == MANIFEST
        )

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
        """
        from pyarrow import fs

        target.parent.mkdir(parents=True, exist_ok=True)
        base = f"{self.base}/{name}"
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.fetched-"))
        try:
            os.chmod(scratch, 0o755)
            for info in self.filesystem.get_file_info(fs.FileSelector(base, recursive=True)):
                if info.type != fs.FileType.File:
                    continue
                path = scratch / PurePosixPath(info.path).relative_to(base)
                path.parent.mkdir(parents=True, exist_ok=True)
                with (
                    self.filesystem.open_input_stream(info.path) as source,
                    path.open("wb") as sink,
                ):
                    shutil.copyfileobj(source, sink, 2**20)
                    sink.flush()
                    os.fsync(sink.fileno())
            check(scratch)
            if target.exists():
                shutil.rmtree(target)
            os.replace(scratch, target)
            fsync_folder(target.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Remove a folder, its manifest first."""
        base = f"{self.base}/{name}"
        self.filesystem.delete_file(f"{base}/{MANIFEST}")
        self.filesystem.delete_dir(base)


def storage_from_environment() -> Storage | None:
    """The place that METALOOM_STORAGE names, if it is set."""
    uri = os.environ.get("METALOOM_STORAGE", "")
    return Storage(uri) if uri else None


class Mirror:
    """Keeps the newest checkpoints of a folder in an object store, from a thread of its own.

    The folder on disk is the truth: whatever the store does, training goes on, and what it did not
    take is uploaded when it answers again, or later by `metaloom upload`.
    """

    def __init__(self, folder: Path, storage: Storage) -> None:
        self._folder, self._storage = folder, storage
        self._ending = threading.Event()
        self._uploaded = -1
        self._thread = threading.Thread(target=self._run, daemon=True, name="mirror")

    def fetch_newer(self, step: int) -> None:
        """Bring the store's newest checkpoint here if it is newer than this step.

        Raises:
            StorageError: the store does not answer, so nobody knows whether it holds a newer one.
        """
        under = f"checkpoints/{self._folder.name}"
        try:
            for name in reversed(self._stored()):
                if int(name.removeprefix("step-")) <= step:
                    return
                check = partial(check_checkpoint, run=self._folder.name, name=name)
                try:
                    self._storage.get(f"{under}/{name}", self._folder / name, check)
                    return
                except ArtefactError as error:
                    print(
                        f"checkpoint {name} of {self._storage.uri} not used: {error}",
                        file=sys.stderr,
                    )
        except OSError as error:
            if step:
                print(
                    f"warning: {self._storage.uri} does not answer ({_first_line(error)}); going "
                    f"on from the local checkpoint of step {step}.",
                    file=sys.stderr,
                )
                return
            raise StorageError(
                f"{self._storage.uri} does not answer: {_first_line(error)}. It may hold a newer "
                "checkpoint than this machine, which has none. Mend the connection, or unset "
                "METALOOM_STORAGE to begin anew."
            ) from None

    def start(self) -> None:
        """Begin to upload."""
        self._thread.start()

    def close(self, *, flush: bool = True) -> None:
        """Upload what is left, within a bound; say so if the store does not take it.

        Args:
            flush: False leaves it to the next start, which comes at once.
        """
        if not self._thread.is_alive():
            return
        self._ending.set()
        if not flush:
            return
        self._thread.join(_FLUSH_SECONDS)
        if newest_step(self._folder) > self._uploaded:
            print(
                f"warning: {self._storage.uri} did not take the last checkpoint; {self._folder} "
                "keeps it. Upload it when the store answers: metaloom upload",
                file=sys.stderr,
            )

    def _run(self) -> None:
        backoff, warned = _POLL_SECONDS, False
        while True:
            ending = self._ending.is_set()
            try:
                self.upload()
                backoff, warned = _POLL_SECONDS, False
                if ending:
                    return
            except OSError as error:
                # A folder that is not there was replaced by a newer checkpoint meanwhile.
                if not warned and not isinstance(error, FileNotFoundError):
                    print(
                        f"warning: {self._storage.uri} takes no checkpoint ({_first_line(error)}); "
                        "training goes on.",
                        file=sys.stderr,
                    )
                    warned = True
                backoff = min(2 * backoff, _LONGEST_BACKOFF)
            if self._ending.is_set():
                time.sleep(_POLL_SECONDS)
            else:
                self._ending.wait(backoff)

    def upload(self) -> int:
        """Upload the newest checkpoint if the store lacks it; returns its step, -1 for none."""
        newest = newest_step(self._folder)
        if newest > self._uploaded and newest > 0:
            under = f"checkpoints/{self._folder.name}"
            folder = checkpoint_folders(self._folder)[0]
            self._storage.put(folder, f"{under}/{folder.name}")
            for old in self._stored()[:-KEPT]:
                self._storage.remove(f"{under}/{old}")
            self._uploaded = newest
        return self._uploaded

    def _stored(self) -> list[str]:
        """Whole checkpoints of this run in the store, the oldest first."""
        names = self._storage.names(f"checkpoints/{self._folder.name}")
        return [name for name in names if re.fullmatch(r"step-\d{8,}", name)]


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


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


def upload_checkpoints(root: Path) -> list[str]:
    """Upload what a store did not take while runs wrote it; returns the runs that have something.

    Args:
        root: the folder of all runs' checkpoints.

    Raises:
        StorageError: the store does not answer now either; everything is still here.
    """
    storage = storage_from_environment()
    if storage is None:
        return []
    folders = [p for p in sorted(root.glob("*")) if newest_step(p) > 0]
    try:
        for folder in folders:
            Mirror(folder, storage).upload()
    except OSError as error:
        raise StorageError(
            f"{storage.uri} takes no checkpoint: {_first_line(error)}. They are still in {root}; "
            "run `metaloom upload` again when it answers."
        ) from None
    return [folder.name for folder in folders]


def clear_everywhere(folder: Path) -> None:
    """Remove the checkpoints of a finished run, here and in the object store."""
    clear_checkpoints(folder)
    storage = storage_from_environment()
    if storage is None:
        return
    under = f"checkpoints/{folder.name}"
    try:
        for name in storage.names(under):
            storage.remove(f"{under}/{name}")
    except OSError as error:
        print(
            f"warning: {storage.uri}/{under} could not be removed ({_first_line(error)}); the run "
            "is done and does not need it.",
            file=sys.stderr,
        )
