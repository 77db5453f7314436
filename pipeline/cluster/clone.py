"""A clone for a run of one commit: made once, taken again after a kill, worked in by one at a time.

A clone and not a git worktree: a worktree keeps its branch from being checked out elsewhere, leaves
its traces in the original when its folder is removed, and shares the original's index of refs. A
clone shares nothing (its objects are copies, no hard links) but DVC's cache, and is gone when its
folder is.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from pipeline.cluster.commands import git, safe_name, try_git
from pipeline.cluster.share import LOCK, adopt_settings
from pipeline.core.errors import ConfigError, MachineError
from pipeline.core.files import read_json, write_json

RUNS = Path(".metaloom/runs")
CLONE_VARIABLE = "METALOOM_CLONE"
"""In the environment of every process that works in a clone: its folder."""
_MARK = Path(".metaloom/run.json")
_ENGINE = Path(".metaloom/engine.json")
JOURNAL = Path(".metaloom/journal")
"""Of metrics that the tracking server has not got yet; it is empty where it has all."""
_KEPT = 3
"""Finished clones that stay, for a look at what they left."""
_SHORT = 12


@dataclass(frozen=True)
class Clone:
    """A folder in which one commit is run."""

    folder: Path
    commit: str
    branch: str
    """Where its results go."""
    arguments: tuple[str, ...]
    """Of `dvc repro`: what the run is, beside the commit."""
    attempt: int = 1
    """How often it was begun or taken again."""
    done: bool = False
    kind: str = "run"
    """What works in it: a retraining changes the data that a run must not."""

    def mark(self, **changes: Any) -> Clone:
        """Write down what has become of it, and return that."""
        new = replace(self, **changes)
        write_json(self.folder / _MARK, {**asdict(new), "folder": str(self.folder)})
        return new


def resolve_commit(root: Path, name: str) -> str:
    """The full hash of what a person calls a commit: a hash, a branch, a tag, `HEAD~1`.

    Raises:
        ConfigError: there is no such commit.
    """
    wanted = f"{safe_name('commit', name)}^{{commit}}"
    found = try_git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", wanted)
    if found.returncode != 0:
        raise ConfigError(f"{name!r} names no commit of {root}. `git log --oneline` lists them.")
    return found.stdout.strip()


def check_branch_name(root: Path, name: str) -> str:
    """The same name, if git takes it for a branch.

    Raises:
        ConfigError: it does not.
    """
    safe_name("branch", name)
    if try_git(root, "check-ref-format", f"refs/heads/{name}").returncode != 0:
        raise ConfigError(f"git takes no branch called {name!r}; `git help check-ref-format`.")
    return name


def check_branch(root: Path, name: str) -> str:
    """The same name, if a new branch can have it.

    Raises:
        ConfigError: git does not take such a name, or the branch exists.
    """
    if branch_tip(root, check_branch_name(root, name)):
        raise ConfigError(f"{root} has a branch {name!r} already. Give another with --branch.")
    return name


def check_remote(root: Path, name: str) -> str:
    """The same name, if it is one of the repository's git remotes.

    Raises:
        ConfigError: it is not.
    """
    if safe_name("remote", name) not in git(root, "remote").split():
        raise ConfigError(f"{root} has no git remote {name!r}; see `git remote -v`.")
    return name


def branch_tip(root: Path, name: str) -> str | None:
    """The commit that a branch points to; None where there is no such branch."""
    found = try_git(root, "rev-parse", "--verify", "--quiet", f"refs/heads/{name}")
    return found.stdout.strip() or None


def changed_files(root: Path, written: Sequence[str] = ()) -> list[str]:
    """Files that differ from the commit, but for those that the pipeline itself writes.

    Args:
        written: outputs of the pipeline; dvc.lock is one of them.
    """
    status = git(root, "status", "--porcelain=v1", "-z", "--no-renames", "--untracked-files=all")
    names = [entry[3:] for entry in status.split("\0") if entry]
    return [name for name in names if not is_output(name, written)]


def is_output(name: str, written: Sequence[str]) -> bool:
    """Whether a file is dvc.lock or one of the pipeline's outputs, or lies in one."""
    return any(name == out or name.startswith(f"{out}/") for out in (LOCK, *written))


@contextmanager
def only_runner(root: Path, commit: str) -> Iterator[None]:
    """Be the only process on this machine that runs this commit.

    Raises:
        MachineError: another one does; says which.
    """
    path = root / RUNS / f"{commit[:_SHORT]}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise MachineError(
                f"{commit[:_SHORT]} is being run already, by {_described(file.read())}. Wait for "
                "it, or end it and run the same command again: it goes on from there."
            ) from None
        file.truncate(0)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        file.write(json.dumps(me))
        file.flush()
        yield


def take_clone(
    root: Path, commit: str, branch: str | None, arguments: Sequence[str], *, kind: str = "run"
) -> Clone:
    """The unfinished clone of the same run, or a new one.

    Call it within `only_runner`.

    Raises:
        ConfigError: there is such a branch already, and not by an earlier try of this run.
        MachineError: processes of a killed run still work in the clone, or it cannot be made.
    """
    for folder in sorted((root / RUNS).glob(f"{commit[:_SHORT]}-*"), reverse=True):
        found = _read(folder)
        if found is None:
            shutil.rmtree(folder)  # its making was interrupted
        elif not found.done and (found.arguments, found.kind) == (tuple(arguments), kind):
            _refuse_leftovers(found)
            if branch not in (None, found.branch):
                check_branch(root, branch)
            return found.mark(branch=branch or found.branch, attempt=found.attempt + 1)
    _tidy(root)
    return _new_clone(root, commit, branch, tuple(arguments), kind)


def _new_clone(
    root: Path, commit: str, branch: str | None, arguments: tuple[str, ...], kind: str
) -> Clone:
    now = time.strftime("%Y%m%d-%H%M%S")
    folder = root / RUNS / f"{commit[:_SHORT]}-{now}"
    branch = check_branch(root, branch or f"runs/{now}-{commit[:7]}")
    git(root, "clone", "--quiet", "--no-hardlinks", "--no-checkout", "--", str(root), str(folder))
    git(folder, "checkout", "--quiet", "--detach", commit)
    if not (folder / ".dvc").is_dir():
        raise MachineError(f"commit {commit[:_SHORT]} holds no DVC repository (`dvc init`).")
    adopt_settings(root, folder)
    if (root / _ENGINE).is_file():  # what was found to be the fastest here is so for the clone
        write_json(folder / _ENGINE, read_json(root / _ENGINE))
    return Clone(folder, commit, branch, arguments, kind=kind).mark()


def _read(folder: Path) -> Clone | None:
    if not (folder / _MARK).is_file():
        return None
    mark = read_json(folder / _MARK)
    return Clone(**{**mark, "folder": folder, "arguments": tuple(mark["arguments"])})


def workers(folder: Path) -> list[psutil.Process]:
    """Living processes that were started to work in a clone, wherever they have gone since.

    The recorder of a stage is none of them: it outlives its stage to close the run in MLflow.
    """
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(CLONE_VARIABLE) == str(folder)
            if ours and "pipeline.runtime.recorder" not in process.cmdline():
                found.append(process)
        except (psutil.Error, OSError):
            continue  # it ended meanwhile, or belongs to somebody else
    return found


def _refuse_leftovers(clone: Clone) -> None:
    """A run that was killed may leave its stage behind, which goes on writing."""
    if alive := sorted(process.pid for process in workers(clone.folder)):
        pids = " ".join(map(str, alive))
        raise MachineError(
            f"processes of a run that was killed still work in {clone.folder}. Wait until they "
            f"have ended, or end them: `kill {pids}`; then run the same command again."
        )


def _tidy(root: Path) -> None:
    """Remove all but the last finished clones, and never one with metrics still to be sent."""
    folders = [path for path in (root / RUNS).iterdir() if path.is_dir()]
    folders.sort(key=lambda path: path.name[-15:])
    finished = [f for f in folders if (clone := _read(f)) and clone.done]
    for folder in finished[: -_KEPT or None]:
        if not any((folder / JOURNAL).glob("*")):
            shutil.rmtree(folder)


def _described(holder: str) -> str:
    try:
        who = json.loads(holder)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(who["since"]))
        return f"process {who['pid']} on {who['host']} since {since}"
    except (ValueError, KeyError, TypeError):
        return "another process"
