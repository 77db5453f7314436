"""A job as it travels to another machine: code, inputs and what to run, through the object store.

Folders are named by what they hold, so what is there already is not sent again:
`workspace/code-<digest>`, `workspace/input-<digest>`, and for each job `jobs/<digest>/...`.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from pipeline.core.config import Section
from pipeline.core.errors import ConfigError, StorageError
from pipeline.core.files import (
    MANIFEST,
    canonical_json,
    new_folder,
    read_json,
    sha256_bytes,
    sha256_file,
    verify,
    write_json,
)
from pipeline.launch.base import Job
from pipeline.launch.outputs import fetch_output, put_folder
from pipeline.launch.worker import resolve
from pipeline.runtime.lineage import CODE_FOLDERS, code_root, content_hash
from pipeline.runtime.logs import run_main
from pipeline.runtime.storage import Storage, storage_from_environment

JOB = "METALOOM_JOB"
"""Environment of the pods: the digest of their job."""
WORKSPACE = "METALOOM_WORKSPACE"
_OUTSIDE = ".outside"
_SETTINGS = ("params.yaml", "dvc.yaml")
_OF_THE_DRIVER = ("num_workers", "min_workers", "max_restarts")
"""Differ between machines, and change nothing of what is computed: no part of a job's name."""
_DIGITS = 32
_CODE_IS_WHOLE = ".code-is-whole"


class Packed(NamedTuple):
    """A job in the object store."""

    digest: str
    """Of all that it computes from; the same job has the same one"""

    @property
    def folder(self) -> str:
        """Where all of it is in the store."""
        return f"jobs/{self.digest}"

    def at(self, what: str) -> str:
        """Where its parts are: `spec`, `result`, `outputs`, `live`."""
        return f"{self.folder}/{what}"


def pack(job: Job, storage: Storage) -> Packed:
    """Put a job into the store: what is there already is left as it is.

    Raises:
        StorageError: the store does not take it.
        ArtefactError: a sealed input was altered.
    """
    inputs = {place(path): path for path in _paths(job.config) if _is_input(path, job.outputs)}
    try:
        spec = {
            "entry": job.entry,
            "kind": f"{type(job.config).__module__}:{type(job.config).__qualname__}",
            "config": _moved(job.config).model_dump_json(),
            "num_workers": job.num_workers,
            "min_workers": job.min_workers,
            "max_restarts": job.max_restarts,
            "outputs": [place(path) for path in job.outputs],
            "code": _put_code(storage),
            "inputs": {name: _put_input(storage, path) for name, path in sorted(inputs.items())},
        }
        own = {k: v for k, v in spec.items() if k not in _OF_THE_DRIVER}
        packed = Packed(sha256_bytes(canonical_json(own).encode())[:_DIGITS])
        if "spec" in storage.names(packed.folder):
            return packed
        with tempfile.TemporaryDirectory() as scratch:
            with new_folder(Path(scratch) / "spec", kind="job") as folder:
                write_json(folder / "job.json", spec)
            storage.put(Path(scratch) / "spec", packed.at("spec"))
    except OSError as error:
        raise StorageError(
            f"{storage.uri} does not take the job's code and data: {error}. Mend that, then run "
            "the same command again."
        ) from None
    return packed


def bring(storage: Storage, packed: Packed, target: Path) -> dict[str, Any]:
    """Bring code and inputs of a job into a folder; returns how the job is described.

    The description is not understood here: an image may be older than the code that it brings.

    Raises:
        ArtefactError: what arrives is not what was sent.
        StorageError: the store does not answer.
    """
    try:
        with tempfile.TemporaryDirectory() as scratch:
            storage.get(packed.at("spec"), Path(scratch) / "spec")
            spec: dict[str, Any] = read_json(Path(scratch) / "spec" / "job.json")
            if not (target / _CODE_IS_WHOLE).exists():
                storage.get(f"workspace/code-{spec['code']}", Path(scratch) / "code")
                shutil.copytree(Path(scratch) / "code", target, dirs_exist_ok=True)
                (target / _CODE_IS_WHOLE).touch()
        for name, digest in spec["inputs"].items():
            if not (target / name).exists():
                fetch_output(storage, f"workspace/input-{digest}", target / name)
    except OSError as error:
        raise StorageError(
            f"{storage.uri} does not give the job {packed.digest} and its data: {error}. Look "
            "whether this pod may read it."
        ) from None
    return spec


def unpack(storage: Storage, packed: Packed, target: Path) -> Job:
    """`bring`, and the job, by its own code; its paths are relative to the folder.

    Raises:
        ArtefactError: what arrives is not what was sent.
        StorageError: the store does not answer.
    """
    spec = bring(storage, packed, target)
    return Job(
        entry=spec["entry"],
        config=resolve(spec["kind"]).model_validate_json(spec["config"]),
        num_workers=spec["num_workers"],
        min_workers=spec["min_workers"],
        max_restarts=spec["max_restarts"],
        outputs=tuple(Path(name) for name in spec["outputs"]),
    )


def place(path: Path) -> str:
    """Where a path of the driver is in the workspace: the same below its folder, else set apart."""
    full, here = Path(os.path.abspath(path)), Path.cwd()
    if full.is_relative_to(here):
        return full.relative_to(here).as_posix()
    return f"{_OUTSIDE}/{sha256_bytes(str(full.parent).encode())[:12]}/{full.name}"


def job_from_environment() -> tuple[Storage, Packed]:
    """Of a pod: its store and its job.

    Raises:
        ConfigError: METALOOM_STORAGE or METALOOM_JOB is not set.
    """
    storage, digest = storage_from_environment(), os.environ.get(JOB, "")
    if storage is None or not digest:
        raise ConfigError(
            f"METALOOM_STORAGE and {JOB} say what this pod works on, and one of them is not set. "
            "METALOOM_LAUNCHER=kubernetes sets them; see the RayJob that it made."
        )
    return storage, Packed(digest)


def _paths(value: Any) -> Iterator[Path]:
    """All paths in a configuration."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _paths(getattr(value, name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from _paths(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _paths(item)


def _moved(config: Section) -> Section:
    """The configuration with the paths of the workspace."""

    def move(value: Any) -> Any:
        if isinstance(value, Path):
            return Path(place(value))
        if isinstance(value, dict):
            return {key: move(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [move(item) for item in value]
        return value

    return type(config).model_validate(move(config.model_dump()))


def _is_input(path: Path, outputs: Sequence[Path]) -> bool:
    """A folder with data; not what the run leaves, and not its checkpoints, which travel alone."""
    own = path in outputs or ".metaloom" in path.parts
    return not own and path.is_dir() and any(path.iterdir()) and not _holds_checkpoints(path)


def _holds_checkpoints(path: Path) -> bool:
    return any(path.glob("step-*/" + MANIFEST))


def _put_code(storage: Storage) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        sealed = Path(scratch) / "code"
        with new_folder(sealed, kind="code") as folder:
            for source, name in _code():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, folder / name)
        digest = sha256_file(sealed / MANIFEST)[:_DIGITS]
        storage.put(sealed, f"workspace/code-{digest}")
    return digest


def _code() -> Iterator[tuple[Path, str]]:
    root = code_root()
    for folder in CODE_FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path, path.relative_to(root).as_posix()
    for name in _SETTINGS:
        if (Path.cwd() / name).is_file():
            yield Path.cwd() / name, name


def _put_input(storage: Storage, folder: Path) -> str:
    digest = str(content_hash(folder))[:_DIGITS]
    name = f"workspace/input-{digest}"
    if f"input-{digest}" not in storage.names("workspace"):
        if (folder / MANIFEST).is_file():
            verify(folder)  # a name that says what it holds must not be given to anything else
        put_folder(storage, folder, name)
    return digest


def main() -> None:
    """Argument: the folder. Of a pod's init container: bring what the job needs there."""
    storage, packed = job_from_environment()
    bring(storage, packed, Path(sys.argv[1]))


if __name__ == "__main__":
    run_main(main)
