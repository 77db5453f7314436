"""What a training run is called while it runs, and the folder that it leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.core.files import canonical_json, new_folder, write_json
from pipeline.engine.learner import Learner, save_learner
from pipeline.runtime.checkpoint import clear_checkpoints, is_finished, mark_finished
from pipeline.runtime.context import Context, fingerprint
from pipeline.runtime.lineage import code_hash, code_root, content_hash
from pipeline.runtime.logs import say
from pipeline.runtime.mirror import clear_stored
from pipeline.training.state import Best, TrainState

_CHECKPOINTS = Path(".metaloom/checkpoints")


def run_folder(name: str, config: dict[str, Any], inputs: Sequence[Path]) -> Path:
    """Where a run's checkpoints live: named by code, configuration and data.

    The same run finds its checkpoints again; any change starts a new run. The number of workers is
    no part of it.
    """
    identity = {
        "code": code_hash(code_root()),
        "config": config,
        "inputs": [content_hash(path) for path in inputs],
    }
    digest = hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]
    return _CHECKPOINTS / f"{name}-{digest}"


def begin_run(name: str, config: dict[str, Any], inputs: Sequence[Path]) -> Path:
    """The run's folder of checkpoints; those of finished runs of this name go, if they are others.

    One that finished and is asked for again was killed before its result was recorded, or its
    result was lost: it is made again from the last checkpoint.
    """
    folder = run_folder(name, config, inputs)
    for other in folder.parent.glob(f"{name}-*"):
        if other != folder and is_finished(other):
            clear_checkpoints(other)
    if is_finished(folder):
        say("finished before", why=f"only its result is made; remove {folder} to train it anew")
    return folder


def finish_run(folder: Path) -> None:
    """The result is there, but whoever asked for it has still to record it: keep the last
    checkpoint of this machine until another run begins."""
    mark_finished(folder)
    clear_stored(folder)


def best_of(state: TrainState) -> Best:
    """The best validated parameters; the last step is always validated."""
    assert state.best is not None
    return state.best


def leave_learner(
    target: Path, learner: Learner, state: TrainState, origin: dict[str, Any], context: Context
) -> dict[str, Any]:
    """Seal the best learner of a run with its history into `target`; returns the run's metrics.

    Only what a rerun gives again goes into the folder: no times, no number of workers; with engine
    strategy `auto`, what a rerun gives on a machine that chooses the same.
    """
    best, progress = best_of(state), state.progress
    metrics = {
        "val_accuracy": best.val_accuracy,
        "best_step": best.step,
        "steps": progress.step,
        "stopped": progress.stopped,
        "skipped": progress.skipped,
    }
    if context.is_main:
        finished = replace(
            learner,
            model=learner.model.with_statistics(best.statistics or None),
            origin={
                **origin,
                **metrics,
                "fingerprint": fingerprint(),
                "machines": progress.machines,
            },
        )
        rows = [{"val_accuracy": None, **row} for row in progress.history]
        with new_folder(target, kind="learner") as folder:
            save_learner(folder, finished)
            write_json(folder / "history.json", rows)
    return metrics
