"""The launchers, by name, and the one way to use them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.config import Section
from pipeline.core.errors import ConfigError
from pipeline.launch.base import (
    Job,
    Launcher,
    max_restarts_from_environment,
    num_workers_from_environment,
)
from pipeline.launch.kubernetes_job import launch_kubernetes
from pipeline.launch.local import launch_local
from pipeline.launch.ray_train import launch_ray_train
from pipeline.launch.torchrun import launch_torchrun

LAUNCHERS: Mapping[str, Launcher] = {
    "local": launch_local,
    "ray_train": launch_ray_train,
    "torchrun": launch_torchrun,
    "kubernetes": launch_kubernetes,
}

_FOLDER = Path(".metaloom/launch")
_KEPT = 10
"""Folders of failed runs that stay, for a look at their workers' logs."""


def launch(entry: str, config: Section, *, most: int, outputs: Sequence[Path] = ()) -> Any:
    """Run `entry` on the workers that the environment asks for; return the first one's result.

    METALOOM_LAUNCHER picks the launcher (default `local`) and METALOOM_NUM_WORKERS the number of
    workers: where a run happens is no part of what it computes.

    Args:
        most: how many workers can share the work.
        outputs: folders that the main worker leaves, wherever it runs.

    Raises:
        ConfigError: the environment asks for something that does not exist.
        PipelineError: a worker's own error.
    """
    name = os.environ.get("METALOOM_LAUNCHER", "local")
    if name not in LAUNCHERS:
        raise ConfigError(
            f"METALOOM_LAUNCHER is {name!r}. Set it to one of: {', '.join(LAUNCHERS)}."
        )
    least, number = num_workers_from_environment(most)
    if number > most:
        raise ConfigError(
            f"METALOOM_NUM_WORKERS asks for {number} workers, and there is work for {most}: some "
            "would have none. Lower it, or raise num_groups (which changes the run)."
        )
    restarts = max_restarts_from_environment()
    job = Job(entry, config, number, least, restarts, tuple(outputs), most)
    _FOLDER.mkdir(parents=True, exist_ok=True)
    _remove_old_folders()
    folder = Path(tempfile.mkdtemp(dir=_FOLDER, prefix="run-"))
    with _alone_with(folder):
        result = LAUNCHERS[name](job, folder)
    shutil.rmtree(
        folder, ignore_errors=True
    )  # kept when the run failed: it holds the workers' logs
    return result


def _remove_old_folders() -> None:
    """All but the latest of those that failed; other launches may run beside this one."""
    ages: dict[Path, float] = {}
    for folder in _FOLDER.glob("run-*"):
        with contextlib.suppress(FileNotFoundError):
            ages[folder] = folder.stat().st_mtime
    for old in sorted(ages, key=lambda folder: ages[folder])[:-_KEPT]:
        with contextlib.suppress(FileNotFoundError, BlockingIOError), _alone_with(old):
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _alone_with(folder: Path) -> Iterator[None]:
    """Hold a launch's folder; the kernel lets go of it however this process ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(held)
