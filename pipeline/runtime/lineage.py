"""Where a run came from: code, commit, dvc.lock, content of folders, and the pipeline around it."""

from __future__ import annotations

import hashlib
import itertools
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.files import MANIFEST, sha256_bytes, sha256_file

CODE_FOLDERS = ("pipeline", "stages")
_GIT_TIMEOUT_SECONDS = 20


def code_root() -> Path:
    """The folder that holds the running `pipeline` package."""
    return Path(__file__).resolve().parents[2]


def code_hash(root: Path) -> str:
    """SHA-256 over the path and content of every .py file under pipeline/ and stages/."""
    digest = hashlib.sha256()
    for folder in CODE_FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            line = f"{path.relative_to(root).as_posix()} {sha256_file(path)}\n"
            digest.update(line.encode())
    return digest.hexdigest()


def content_hash(path: Path) -> str | None:
    """SHA-256 that names what a file or folder holds; None when it is absent.

    A sealed folder is named by its manifest, which vouches for every byte. Any other folder is
    hashed file by file.
    """
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        return None
    if (path / MANIFEST).is_file():
        return sha256_file(path / MANIFEST)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    lines = [f"{file.relative_to(path).as_posix()} {sha256_file(file)}" for file in files]
    return sha256_bytes("\n".join(lines).encode())


def file_hash(path: Path) -> str:
    """SHA-256 of a file, or `none` when there is no such file."""
    return sha256_file(path) if path.is_file() else "none"


@dataclass(frozen=True)
class GitState:
    """The commit that the working tree stands on."""

    commit: str
    """Full hash, or `none` outside a repository."""
    dirty: bool
    """Whether files differ from the commit; dvc.lock and what DVC's stages write do not count."""


def git_state(root: Path) -> GitState:
    """Commit and dirty flag of a folder's repository; outside one the code counts as dirty."""
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return GitState("none", dirty=True)
    status = _git(root, "status", "--porcelain=v1", "-z", "--no-renames", "--untracked-files=all")
    changed = [entry[3:] for entry in (status or "").split("\0") if entry]
    written = [path for outputs in pipeline_outputs(root).values() for path in outputs]
    dirty = status is None or any(not _made_by_dvc(path, written) for path in changed)
    return GitState(commit.strip(), dirty)


def pipeline_outputs(root: Path) -> dict[str, list[str]]:
    """Every stage in dvc.lock with the paths that it wrote (a `matrix` stage keeps its `@`)."""
    import yaml  # here, because workers on bare machines do without it

    try:
        lock = yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8"))
        stages = dict(lock["stages"])
        return {
            name: [out["path"] for out in stage.get("outs", [])] for name, stage in stages.items()
        }
    except (
        OSError,
        UnicodeDecodeError,
        yaml.YAMLError,
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
    ):
        return {}


def home(root: Path) -> Path:
    """The folder that keeps runs: `root`, or its main working tree for a DVC experiment's copy.

    `dvc exp run --temp` and `--queue` run in a copy under `.dvc/tmp/exps/` that DVC deletes.
    """
    parts = root.resolve().parts
    for index in range(len(parts) - 2):
        if parts[index : index + 3] == (".dvc", "tmp", "exps"):
            return Path(*parts[:index])
    return root.resolve()


def flatten(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as one level of dotted keys; lists stay whole."""
    if not isinstance(values, dict):
        return {prefix: str(values)}
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def pipeline_key() -> tuple[str, str]:
    """What stages of one pipeline run share, and the process that owns it (host/pid/start time).

    It is METALOOM_PIPELINE_RUN if set, else the nearest `dvc` process above us, else this process's
    parent alone.
    """
    above = _psutil().Process().parents()
    dvc = next((process for process in above if _is_dvc(process)), None)
    owner = process_name(dvc.pid if dvc else os.getppid())
    return os.environ.get("METALOOM_PIPELINE_RUN") or owner, owner


def process_name(pid: int) -> str:
    """A process, named so that a later process with the same number is a different one."""
    psutil = _psutil()
    try:
        started = f"{psutil.Process(pid).create_time():.2f}"
    except psutil.Error:
        started = "gone"
    return f"{socket.gethostname()}/{pid}/{started}"


def has_ended(name: str) -> bool:
    """Whether a process named by `process_name` is known to be gone; other hosts' are not known."""
    host, _, rest = name.partition("/")
    pid = rest.partition("/")[0]
    return host == socket.gethostname() and pid.isdigit() and process_name(int(pid)) != name


def _psutil() -> Any:
    """Untyped, and needed only where runs are recorded."""
    import psutil

    return psutil


def _is_dvc(process: Any) -> bool:
    try:
        command: list[str] = process.cmdline()
    except _psutil().Error:
        return False
    if any(Path(part).name == "dvc" for part in command[:2]):
        return True
    return ("-m", "dvc") in itertools.pairwise(command)


def _made_by_dvc(path: str, written: list[str]) -> bool:
    return path == "dvc.lock" or any(
        path.rstrip("/") == out or path.startswith(f"{out}/") for out in written
    )


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
