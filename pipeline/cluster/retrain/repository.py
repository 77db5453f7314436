"""The team's repository, on a machine that has none of it yet."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.cluster.clone import resolve_commit
from pipeline.cluster.commands import git, try_git
from pipeline.core.errors import MachineError


def bring_repository(url: str, folder: Path) -> Path:
    """A clone of a git repository that stays up to date with it.

    Raises:
        MachineError: it cannot be cloned or fetched.
    """
    if not url.startswith(("https://", "ssh://", "file://", "/")) and not _is_scp_like(url):
        raise MachineError(
            f"{url!r} is no address of a git repository: https://, ssh://, user@host:path, or an "
            "absolute path."
        )
    root = folder / "repository"
    if not root.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        half = folder / "half"  # what a kill leaves is no repository
        shutil.rmtree(half, ignore_errors=True)
        git(folder, "clone", "--quiet", "--", url, str(half))
        half.rename(root)
    git(root, "fetch", "--quiet", "--prune", "origin")
    return root


def _is_scp_like(url: str) -> bool:
    user, at, rest = url.partition("@")
    host, colon, path = rest.partition(":")
    names = all(part and not part.startswith("-") for part in (user, host, path))
    return bool(at and colon and names and "/" not in user + host)


def commit_of(root: Path, name: str) -> str:
    """A commit by hash, or a branch as the remote has it now."""
    remote = try_git(
        root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"refs/remotes/origin/{name}"
    )
    return remote.stdout.strip() or resolve_commit(root, name)
