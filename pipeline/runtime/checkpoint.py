"""Checkpoints: a new sealed directory for each, the newest good one is resumed."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from pipeline.core.errors import ArtefactError, StorageError
from pipeline.core.files import MANIFEST, new_folder, read_json, sha256_file, verify, write_json

_KEPT = 2
_STEP = re.compile(r"step-\d{8,}")
_TENSORS, _STATE = "tensors.safetensors", "state.json"
_FINISHED = ".finished"


class Checkpoint(NamedTuple):
    """All that a run needs to go on."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Write `step-XXXXXXXX`: files, fsync, manifest, rename, fsync of the parent; keep two.

    Raises:
        StorageError: the disk refused; earlier checkpoints are as they were.
    """
    target = folder / _name(step)
    if target.exists():
        return  # the same step of the same run has the same weights: never overwrite
    try:
        with new_folder(target, step=step, run=folder.name) as building:
            safetensors.torch.save_file(
                {n: t.detach().cpu().clone() for n, t in tensors.items()},
                building / _TENSORS,
            )
            write_json(building / _STATE, dict(state))
        for old in checkpoint_folders(folder)[_KEPT:]:
            going = old.with_name(f".{old.name}.old")  # hidden in one step: never half removed
            old.rename(going)
            shutil.rmtree(going)
    except (OSError, safetensors.SafetensorError) as error:
        raise StorageError(
            f"cannot write the checkpoint {target}: {error}. Free some space or mend the "
            "disk, then run the same command again: it resumes from the last good checkpoint."
        ) from error


def tidy_checkpoints(folder: Path) -> None:
    """Set damaged checkpoints aside, by name, and remove what a killed writer left.

    One worker does this before any loads, so that all resume from the same step.

    Raises:
        StorageError: the disk refuses that.
    """
    try:
        for leftover in folder.glob(".step-*"):
            shutil.rmtree(leftover)
        for path in checkpoint_folders(folder):
            _set_aside_if_damaged(path)
    except OSError as error:
        raise StorageError(
            f"cannot tidy up the checkpoints in {folder}: {error}. Mend the disk, then run the "
            "same command again."
        ) from error


def _set_aside_if_damaged(path: Path) -> None:
    try:
        _read(path)
    except ArtefactError as error:
        aside = path.with_name(f"damaged-{time.time_ns()}-{path.name}")
        path.rename(aside)
        print(f"checkpoint not used, kept as {aside}: {error}", file=sys.stderr)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, every byte as it was written; None where there is none.

    Raises:
        ArtefactError: it is damaged; `tidy_checkpoints` sets such ones aside.
    """
    newest = checkpoint_folders(folder)
    return _read(newest[0]) if newest else None


def newest_step(folder: Path) -> int:
    """Of the newest checkpoint; 0 where there is none."""
    found = checkpoint_folders(folder)
    return int(found[0].name.removeprefix("step-")) if found else 0


def newest_digest(folder: Path) -> int:
    """A number that names the bytes of the newest checkpoint; 0 where there is none."""
    found = checkpoint_folders(folder)
    return int(sha256_file(found[0] / MANIFEST)[:14], 16) if found else 0


def drop_checkpoint(folder: Path, step: int) -> None:
    """Remove the checkpoint of one step, if there is one."""
    path = folder / _name(step)
    if path.exists():
        going = path.with_name(f".{path.name}.old")
        path.rename(going)
        shutil.rmtree(going)


def _name(step: Any) -> str:
    return f"step-{step:08d}" if isinstance(step, int) else "of no step"


def clear_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a finished run."""
    shutil.rmtree(folder, ignore_errors=True)


def mark_finished(folder: Path) -> None:
    """The run has come to its end; its last checkpoint stays until somebody else's run begins."""
    if folder.is_dir():
        (folder / _FINISHED).touch()


def is_finished(folder: Path) -> bool:
    """Whether the run of these checkpoints came to its end."""
    return (folder / _FINISHED).exists()


def check_checkpoint(path: Path, run: str, name: str) -> None:
    """Verify every byte of what is to become a run's checkpoint of some name.

    Raises:
        ArtefactError: it is damaged, or another one.
    """
    manifest = verify(path)
    if name != _name(manifest.get("step")):
        raise ArtefactError(f"it holds step {manifest.get('step')}, not the one of its name")
    if manifest.get("run") != run:
        raise ArtefactError(f"it is of another run, {manifest.get('run')}")
    if set(manifest["files"]) != {_TENSORS, _STATE}:
        raise ArtefactError("it does not hold a checkpoint's files")


def _read(path: Path) -> Checkpoint:
    check_checkpoint(path, path.parent.name, path.name)
    return Checkpoint(safetensors.torch.load_file(path / _TENSORS), read_json(path / _STATE))


def checkpoint_folders(folder: Path) -> list[Path]:
    """All checkpoints of a run, the newest first; nothing of them is verified."""
    found = (p for p in folder.glob("step-*") if p.is_dir() and _STEP.fullmatch(p.name))
    return sorted(found, reverse=True)
