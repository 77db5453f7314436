"""What the main worker leaves, on its way to a driver that does not share its folders."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.files import MANIFEST, fsync_folder, new_folder
from pipeline.runtime.storage import Storage


def put_outputs(storage: Storage, outputs: Sequence[Path], name: str) -> None:
    """Put folders into the object store as `name/0`, `name/1`, ...; those not sealed are sealed."""
    for index, output in enumerate(outputs):
        put_folder(storage, output, f"{name}/{index}")


def put_folder(storage: Storage, folder: Path, name: str) -> None:
    """Put one folder into the object store; one that is not sealed travels inside one that is."""
    if (folder / MANIFEST).is_file():
        storage.put(folder, name)
        return
    with tempfile.TemporaryDirectory() as scratch:
        sealed = Path(scratch) / "sealed"
        with new_folder(sealed, kind="output") as building:
            shutil.copytree(folder, building / "content")
        storage.put(sealed, name)


def fetch_output(storage: Storage, name: str, target: Path) -> None:
    """Download and check one folder beside its place, then rename it: never mixed with an old one.

    The scratch folder's name is one that `new_folder` clears away if this process is killed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.building-"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as scratch:
        sealed = Path(scratch) / "sealed"
        storage.get(name, sealed)
        content = sealed / "content"  # of a folder that was not sealed itself
        if target.exists():
            os.replace(target, Path(scratch) / "old")
        os.replace(content if content.is_dir() else sealed, target)
    fsync_folder(target.parent)
