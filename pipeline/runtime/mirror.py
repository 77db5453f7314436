"""Copies of sealed folders in an object store, made beside the work that must not wait for it."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from pipeline.core.errors import ArtefactError, StorageError
from pipeline.core.files import verify
from pipeline.runtime.checkpoint import (
    check_checkpoint,
    checkpoint_folders,
    is_finished,
    newest_step,
)
from pipeline.runtime.storage import Storage, storage_from_environment

KEPT = 2
_POLL_SECONDS = 0.5
_LONGEST_BACKOFF = 15.0
_FLUSH_SECONDS = 20.0
# Of a copy that is being uploaded; the trainer tidies up names that begin with `step-` or `.step-`.
_COPY = ".mirror-"


class Mirror:
    """Keeps the newest checkpoints of a folder in an object store, from a thread of its own.

    The folder on disk is the truth: whatever the store does, training goes on, and what it did not
    take is uploaded when it answers again, or later by `metaloom upload`.
    """

    def __init__(self, folder: Path, storage: Storage) -> None:
        self._folder, self._storage = folder, storage
        self._ending = threading.Event()
        self._uploaded = 0
        self._thread = threading.Thread(target=self._run, daemon=True, name="mirror")

    def fetch_newer(self, step: int) -> None:
        """Bring the store's newest checkpoint here if it is newer than this step.

        Raises:
            StorageError: the store does not answer, so nobody knows whether it holds a newer one;
                or the disk of this machine cannot hold it.
        """
        under = f"checkpoints/{self._folder.name}"
        try:
            for name in reversed([name for name, whole in self._stored().items() if whole]):
                if _step(name) <= step:
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
        for left in self._folder.glob(f"{_COPY}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        self._thread.start()

    def close(self, *, flush: bool = True) -> None:
        """Upload what is left, within a bound; say so if the store does not take it.

        Args:
            flush: False leaves it to the next start, which comes at once.
        """
        if self._thread.ident is None:  # it never began
            return
        self._ending.set()
        if not flush:
            return
        self._thread.join(_FLUSH_SECONDS)
        if newest_step(self._folder) > self._uploaded:
            print(
                f"warning: {self._storage.uri} did not take the last checkpoint; {self._folder} "
                "keeps it. A run that is to go on elsewhere needs it there (one that has ended "
                "does not). Upload it when the store answers: metaloom upload",
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
            except Exception as error:  # whatever a store's client raises, training goes on
                if not warned:
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
        """Upload the newest checkpoint if the store lacks it; returns its step, 0 for none."""
        while found := checkpoint_folders(self._folder):
            name, step = found[0].name, _step(found[0].name)
            if step <= self._uploaded:
                break
            with _out_of_reach(found[0]) as folder:
                if folder is None:
                    continue
                self._storage.put(folder, f"checkpoints/{self._folder.name}/{name}")
            self._prune(step)
            self._uploaded = step
            break
        return self._uploaded

    def _prune(self, uploaded: int) -> None:
        """Keep the newest whole ones; a newer torn one may be what another machine is writing."""
        stored = self._stored()
        kept = [name for name, whole in stored.items() if whole][-KEPT:]
        for name, whole in stored.items():
            if name not in kept and (whole or _step(name) < uploaded):
                self._storage.remove(f"checkpoints/{self._folder.name}/{name}")

    def _stored(self) -> dict[str, bool]:
        """Checkpoints of this run in the store, the oldest first, and whether each is whole."""
        folders = self._storage.folders(f"checkpoints/{self._folder.name}")
        return {
            name: whole for name, whole in folders.items() if re.fullmatch(r"step-\d{8,}", name)
        }


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


@contextmanager
def _out_of_reach(source: Path) -> Iterator[Path | None]:
    """A checkpoint under a name of our own: an upload may outlast the trainer's wish to keep it.

    None if it is gone already; the checkpoint itself where the disk takes no copy.
    """
    with ExitStack() as stack:
        found: Path | None
        try:
            scratch = tempfile.TemporaryDirectory(
                dir=source.parent, prefix=_COPY, ignore_cleanup_errors=True
            )
            found = Path(stack.enter_context(scratch))
            for path in source.iterdir():
                _link(path, found / path.name)
            verify(found, later="*")
        except (OSError, ArtefactError):
            stack.close()  # the room of half a copy, too
            found = source if source.exists() else None
        yield found


def _link(source: Path, target: Path) -> None:
    """A second name for a file that nobody writes to any more, or a copy where there are none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__


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
    folders = [p for p in sorted(root.glob("*")) if newest_step(p) > 0 and not is_finished(p)]
    try:
        for folder in folders:
            Mirror(folder, storage).upload()
    except OSError as error:
        raise StorageError(
            f"{storage.uri} takes no checkpoint: {_first_line(error)}. They are still in {root}; "
            "run `metaloom upload` again when it answers."
        ) from None
    return [folder.name for folder in folders]


def clear_stored(folder: Path) -> None:
    """Remove the checkpoints of a finished run from the object store."""
    storage = storage_from_environment()
    if storage is None:
        return
    under = f"checkpoints/{folder.name}"
    try:
        for name in storage.names(under):
            storage.remove(f"{under}/{name}")
        storage.remove(under)
    except OSError as error:
        print(
            f"warning: {storage.uri}/{under} could not be removed ({_first_line(error)}); the run "
            "is done and does not need it.",
            file=sys.stderr,
        )
