"""Where a retraining begins: at fresh weights, or at the champion's, which DVC then keeps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import yaml

from pipeline.cluster.clone import Clone
from pipeline.cluster.commands import dvc, git, try_git
from pipeline.core.errors import ConfigError

CHAMPION = "data/start/champion"
"""A learner in the clone; meta-training begins at it, and at none of the candidates."""
TRACKED = f"{CHAMPION}.dvc"
START = "Start"
"""Trailer of the commit that places or removes it."""
FRESH = "fresh weights"

Bring = Callable[[Path], str | None]
"""Leaves the champion's learner in a folder and says which version it is; None if there is none."""


def place_start(
    clone: Clone, wanted: Literal["scratch", "champion"], bring: Bring, who: list[str]
) -> tuple[Clone, str]:
    """A commit with the learner that the policy wants, and what to call it.

    The commit names the learner's hash, so that a run of it can be repeated. A run that is taken up
    again keeps the start that it has.

    Args:
        who: options of git that name the committer.

    Raises:
        ConfigError: params.yaml would throw the champion's weights away.
        PipelineError: the champion cannot be had.
    """
    folder = clone.folder
    if placed := _placed(folder):
        return clone, placed
    name = None
    if wanted == "champion":
        _check_warm(folder)
        shutil.rmtree(folder / CHAMPION, ignore_errors=True)
        name = bring(folder / CHAMPION)
    if name is not None:
        dvc(folder, "add", "--quiet", CHAMPION)
    elif (folder / TRACKED).is_file():
        dvc(folder, "remove", TRACKED)
        shutil.rmtree(folder / CHAMPION, ignore_errors=True)
    name = name or FRESH
    if (folder / TRACKED).parent.is_dir():
        git(folder, "add", "--all", "--", str(Path(TRACKED).parent))
    if try_git(folder, "diff", "--cached", "--quiet").returncode != 0:
        text = f"Start at {name}\n\n{START}: {name}"
        git(folder, *who, "commit", "--quiet", "--no-verify", "--message", text)
        clone = clone.mark(commit=git(folder, "rev-parse", "HEAD").strip())
    return clone, name


def _placed(folder: Path) -> str:
    form = f"--format=%(trailers:key={START},valueonly)"
    return git(folder, "log", "-1", form).strip()


def _check_warm(folder: Path) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    if not params.get("meta_train", {}).get("warm_start", True):
        raise ConfigError(
            "retrain.start is `champion`, and meta_train.warm_start false begins with fresh "
            "weights. Set one of them otherwise."
        )
