"""Machines as far as DVC and git see them: clones with a cache, a PATH and a registry each."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.e2e import test_pipeline as e2e

REMOTE = "storage"


def environment(folder: Path, s3: Mapping[str, str]) -> dict[str, str]:
    """As on a user's machine, with the keys of the object store."""
    return {**e2e.environment(folder), **s3, "PYTHONDONTWRITEBYTECODE": "1"}


def attempt(
    folder: Path, env: Mapping[str, str], *command: str
) -> subprocess.CompletedProcess[str]:
    """A command that may fail."""
    return subprocess.run(
        command, cwd=folder, env=dict(env), capture_output=True, text=True, check=False
    )


def succeed(folder: Path, env: Mapping[str, str], *command: str) -> str:
    """A command's standard output; a failure shows everything that it said."""
    done = attempt(folder, env, *command)
    said = f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    assert done.returncode == 0, f"{' '.join(command)} -> {done.returncode}\n{said}"
    return done.stdout


def add_remote(folder: Path, env: Mapping[str, str], url: str, *, verify: bool = True) -> None:
    """What docs/cluster.md says, command by command."""
    succeed(folder, env, "dvc", "remote", "add", "--default", REMOTE, url)
    if verify:
        succeed(folder, env, "dvc", "remote", "modify", REMOTE, "verify", "true")


def only_stage(folder: Path, env: Mapping[str, str], allowed: str) -> tuple[dict[str, str], Path]:
    """An environment in which no stage but one can run; and the list of those that were tried."""
    tried = folder.parent / f"{folder.name}.tried"
    programs = folder.parent / f"{folder.name}.programs"
    programs.mkdir()
    python = programs / "python"
    python.write_text(
        f"""#!{sys.executable}
import os, sys
with open({str(tried)!r}, "a") as file:
    print(*sys.argv[1:3], file=file)
if sys.argv[1:3] != ["-m", "stages.{allowed}"]:
    sys.exit("this machine must not compute")
os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
"""
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return {**env, "PATH": f"{programs}{os.pathsep}{env['PATH']}"}, tried


def contents(folder: Path, *names: str) -> dict[str, bytes]:
    """Every file below some paths, by name."""
    found = {}
    for name in names:
        top = folder / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found
