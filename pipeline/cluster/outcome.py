"""A run's way from a clone back to its repository: computed, recorded as a commit, pushed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.cluster.clone import Clone, branch_tip, changed_files, check_branch, is_output
from pipeline.cluster.commands import git, try_git
from pipeline.cluster.repro import repro
from pipeline.cluster.share import LOCK, read_lock, share
from pipeline.core.errors import MachineError, PipelineError, StoppedError


def compute(
    clone: Clone,
    environment: Mapping[str, str],
    remote: str | None,
    *,
    push: bool,
    listen: Callable[[str], None] | None = None,
) -> None:
    """As `repro`; stages that were finished before one failed are shared all the same."""
    try:
        repro(clone, environment, pull=remote is not None, listen=listen)
    except (StoppedError, KeyboardInterrupt):
        raise  # whoever asked for it does not wait for an upload
    except PipelineError as error:
        if remote is None or not push:
            raise
        try:
            share(clone.folder)
        except PipelineError as second:
            raise MachineError(f"{error}\nWhat was done is not shared: {second}") from None
        raise


def record(
    root: Path, clone: Clone, text: str, notes: list[str], *, also: Sequence[str] = ()
) -> str | None:
    """Commit the lock and the results that git keeps; None if the run changed none of them.

    Args:
        text: the commit's message.
        notes: gets a line where the run left files that nobody keeps.
        also: more files to commit.
    """
    written = [out["path"] for outs in read_lock(clone.folder).values() for out in outs]
    changed = changed_files(clone.folder)
    ours = [LOCK, *also, *(name for name in changed if is_output(name, written))]
    if strays := sorted(set(changed) - set(ours)):
        notes.append(f"the run also left, and nobody keeps: {strays[:5]}")
    git(clone.folder, "add", "--", *ours)
    if try_git(clone.folder, "diff", "--cached", "--quiet").returncode == 0:
        head = _head(clone)  # of an attempt that was killed later: its branch may be out already
        return head if head != clone.commit else None
    git(clone.folder, "reset", "--quiet", "--soft", clone.commit)
    git(clone.folder, *identity(root), "commit", "--quiet", "--no-verify", "--message", text)
    return _head(clone)


def _head(clone: Clone) -> str:
    return git(clone.folder, "rev-parse", "HEAD").strip()


def identity(root: Path) -> list[str]:
    """Who commits: as in the original repository; a machine without a name says what it is."""
    options = []
    for key, otherwise in (("name", "metaloom run"), ("email", "metaloom@localhost.invalid")):
        found = try_git(root, "config", "--get", f"user.{key}").stdout.strip()
        options += ["-c", f"user.{key}={found or otherwise}"]
    return options


def push(
    root: Path, clone: Clone, recorded: str | None, data_remote: str | None, remote: str | None
) -> None:
    """Data first: a lock whose data nobody can get is worth nothing. No branch is ever moved."""
    if data_remote is not None:
        share(clone.folder)
    if recorded is None:
        return
    if branch_tip(root, clone.branch) != recorded:
        check_branch(root, clone.branch)
        target = f"{recorded}:refs/heads/{clone.branch}"
        git(clone.folder, "push", "--quiet", "--", "origin", target)
    if remote is not None:
        reference = f"refs/heads/{clone.branch}"
        git(root, "push", "--quiet", "--", remote, f"{reference}:{reference}")
