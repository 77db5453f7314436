"""`metaloom run`: one commit, run in a clone of its own; its lock comes back as a commit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster import message
from pipeline.cluster.clone import (
    JOURNAL,
    changed_files,
    check_branch_name,
    check_remote,
    only_runner,
    resolve_commit,
    take_clone,
)
from pipeline.cluster.outcome import compute, push, record
from pipeline.cluster.raw_data import bring_raw_data
from pipeline.cluster.share import default_remote
from pipeline.core.errors import ConfigError, MachineError


@dataclass(frozen=True)
class RunRequest:
    """What a person asked for."""

    commit: str | None = None
    """None: HEAD, and then the working tree must not differ from it."""
    branch: str | None = None
    """None: runs/<time>-<commit>"""
    push: bool = True
    remote: str | None = None
    """A git remote that gets the branch too."""
    allow_dirty: bool = False
    arguments: Sequence[str] = ()
    """Of `dvc repro`."""


@dataclass(frozen=True)
class RunResult:
    """What came of it."""

    commit: str
    clone: str
    attempt: int
    """Above 1 where an unfinished run was taken up again."""
    differed: list[str]
    """Files of the working tree that differed from HEAD: they were no part of the run."""
    recorded: str | None
    """The commit with the new dvc.lock; None if the run left the lock as it was."""
    branch: str | None
    """The branch that the commit came back as."""
    data_remote: str | None
    """The DVC remote that got the data; None: they are in this machine's cache alone."""
    git_remote: str | None
    model: dict[str, Any] | None
    metrics: dict[str, dict[str, float]]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def summary(self) -> str:
        """For people: what was run, what it left, and how to go on."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        again = f" (attempt {self.attempt})" if self.attempt > 1 else ""
        yield f"Ran {self.commit[:12]} in {os.path.relpath(self.clone)}{again}"
        if self.model:
            yield f"  {message.named(self.model)}"
        for name, found in self.metrics.items():
            yield f"  {name:<6} {message.percent(found)}"
        for note in self.notes:
            yield f"note: {note}"
        if self.recorded is None:
            yield "dvc.lock is as the commit has it: there is nothing to merge."
        elif self.branch is None:
            yield f"Its results are commit {self.recorded[:12]} of the clone, and nowhere else."
        else:
            yield from ("", "Go on with:", f"  git merge {self.branch}", "  dvc checkout")


def run_commit(
    root: Path,
    request: RunRequest,
    *,
    written: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> RunResult:
    """Run a commit of the repository `root` in a clone and bring its lock back as a branch.

    Args:
        written: files that the pipeline writes itself: they do not make a working tree dirty.
        environment: set for the stages, such as the tracking server of `root`.

    Raises:
        ConfigError: a name cannot be used, or the working tree is dirty.
        DataError: there are raw data that are neither in git nor in DVC.
        MachineError: git, DVC, a stage or a remote failed; the same command goes on from there.
    """
    root = _top(root)
    commit = resolve_commit(root, "HEAD" if request.commit is None else request.commit)
    differed = _check(root, request, written)
    with only_runner(root, commit):
        clone = take_clone(root, commit, request.branch, request.arguments)
        remote = default_remote(clone.folder)
        notes = [*bring_raw_data(root, clone.folder, remote), *_notes(differed, remote)]
        compute(clone, environment or {}, remote, push=request.push)
        text = message.commit_message(
            clone.folder, clone.commit, differed=differed, arguments=clone.arguments
        )
        recorded = record(root, clone, text, notes)
        if request.push:
            push(root, clone, recorded, remote, request.remote)
        clone.mark(done=True)
    if any((clone.folder / JOURNAL).glob("*")):
        notes.append(
            f"MLflow has not got everything: set MLFLOW_TRACKING_URI and run `metaloom upload` in "
            f"{clone.folder}"
        )
    came_back = request.push and recorded is not None
    return RunResult(
        commit=commit,
        clone=str(clone.folder),
        attempt=clone.attempt,
        differed=differed,
        recorded=recorded,
        branch=clone.branch if came_back else None,
        data_remote=remote if request.push else None,
        git_remote=request.remote if came_back else None,
        model=message.released(clone.folder),
        metrics=message.metrics(clone.folder),
        notes=notes,
    )


def _top(root: Path) -> Path:
    if not (root / ".git").exists() or not (root / ".dvc").is_dir():
        raise MachineError(f"{root} is not the top of a repository of git and DVC; go there.")
    return root.resolve()


def _check(root: Path, request: RunRequest, written: Sequence[str]) -> list[str]:
    """Refuse what cannot be used before anything is made; returns how the working tree differs."""
    if request.branch is not None:
        check_branch_name(root, request.branch)
    if request.remote is not None:
        check_remote(root, request.remote)
    for argument in request.arguments:
        if not argument.isprintable():
            raise ConfigError(f"{argument!r} holds unprintable characters; DVC does not get it.")
    differed = changed_files(root, written)
    if differed and request.commit is None and not request.allow_dirty:
        named = "".join(f"\n  {name}" for name in differed[:10])
        more = f"\n  and {len(differed) - 10} more" if len(differed) > 10 else ""
        raise ConfigError(
            f"the working tree differs from its commit, and a run takes the commit:{named}{more}\n"
            "Commit them; or run HEAD as it is, without them: --allow-dirty."
        )
    return differed


def _notes(differed: Sequence[str], remote: str | None) -> Iterator[str]:
    if differed:
        yield f"{len(differed)} files of the working tree differed and were no part of the run"
    if remote is None:
        yield "no DVC remote: the data are in this machine's cache alone (docs/cluster.md)"
