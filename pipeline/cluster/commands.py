"""git and DVC, called as programs: without a shell, and no name can pass for an option."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from pipeline.core.errors import ConfigError, MachineError

_REPOSITORY_OF_THE_CALLER = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_NAMESPACE",
    "GIT_PREFIX",
)
"""Set inside a git hook, where they would send a command for a clone to the hook's repository."""


def safe_name(kind: str, text: str) -> str:
    """The same text, if a program that gets it as an argument can take it for a name alone.

    Args:
        kind: what it names, for the message.

    Raises:
        ConfigError: it could be read as an option, as a path upwards or as a date (git takes
            `@{anything}` for one), or holds control characters.
    """
    suspect = not text.isprintable() or any(piece in text for piece in ("..", "@{"))
    if not text or text.startswith("-") or suspect:
        raise ConfigError(
            f"{text!r} cannot be the name of a {kind}: it is empty, begins with '-', or holds "
            "'..', '@{' or an unprintable character. Give another name."
        )
    return text


def clean_environment() -> dict[str, str]:
    """This process's environment, without what ties git to one repository."""
    return {k: v for k, v in os.environ.items() if k not in _REPOSITORY_OF_THE_CALLER}


def git(folder: Path, *arguments: str) -> str:
    """What a git command prints.

    Raises:
        MachineError: it failed; its own words are in the message.
    """
    done = try_git(folder, *arguments)
    if done.returncode != 0:
        raise MachineError(f"`git {arguments[0]}` failed in {folder}: {done.stderr.strip()}")
    return done.stdout


def try_git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A git command that may fail.

    Raises:
        MachineError: there is no git.
    """
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            env={
                **clean_environment(),
                "GIT_TERMINAL_PROMPT": "0",
                "GIT_LITERAL_PATHSPECS": "1",
            },
            check=False,
        )
    except FileNotFoundError:
        raise MachineError("git is not installed; runs of a commit need it.") from None


def dvc_command(*arguments: str) -> list[str]:
    """DVC of this Python, whatever lies on the PATH.

    Raises:
        MachineError: it is not installed.
    """
    if importlib.util.find_spec("dvc") is None:
        raise MachineError("DVC is not installed. Install it: `pip install 'metaloom[track]'`.")
    return [sys.executable, "-m", "dvc", *arguments]


def dvc(folder: Path, *arguments: str) -> str:
    """What a DVC command prints.

    Raises:
        MachineError: it failed; its own words are in the message.
    """
    done = subprocess.run(
        dvc_command(*arguments),
        cwd=folder,
        capture_output=True,
        text=True,
        env={**clean_environment(), "DVC_NO_ANALYTICS": "1"},
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip()
        raise MachineError(f"`dvc {' '.join(arguments[:2])}` failed in {folder}: {said}")
    return done.stdout
