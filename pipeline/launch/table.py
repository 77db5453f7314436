"""The launchers, by name, and the one way to use them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
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
from pipeline.launch.local import launch_local
from pipeline.launch.ray_train import launch_ray_train
from pipeline.launch.torchrun import launch_torchrun

LAUNCHERS: Mapping[str, Launcher] = {
    "local": launch_local,
    "ray_train": launch_ray_train,
    "torchrun": launch_torchrun,
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
    job = Job(entry, config, number, least, max_restarts_from_environment(), tuple(outputs))
    _FOLDER.mkdir(parents=True, exist_ok=True)
    for old in sorted(_FOLDER.glob("run-*"), key=lambda path: path.stat().st_mtime)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=_FOLDER, prefix="run-"))
    result = LAUNCHERS[name](job, folder)
    shutil.rmtree(folder)  # kept when the run failed: it holds the workers' logs
    return result
