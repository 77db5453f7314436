"""What runs inside Ray: one worker of a run, and the callback that brings its metrics home."""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray import train
from ray.train import UserCallback
from ray.train.v2._internal.execution.context import get_train_context as get_internal_train_context

from pipeline.core.errors import ConfigError, PipelineError, StoppedError
from pipeline.launch.outputs import put_outputs
from pipeline.launch.worker import resolve
from pipeline.runtime.checkpoint import clear_checkpoints
from pipeline.runtime.context import joined_context
from pipeline.runtime.faults import FaultError, LostPeerError, peers_watched
from pipeline.runtime.journal import Journal, Point
from pipeline.runtime.logs import say
from pipeline.runtime.storage import storage_from_environment

_POLL_SECONDS, _ANSWER_SECONDS = 0.5, 5.0
_END_SECONDS = 30.0


class PreemptedError(Exception):
    """The workers' machines are going away; Ray starts them again elsewhere."""


def work(loop: Mapping[str, Any]) -> None:
    """One worker: run the entry; the main one leaves its result at the desk."""
    desk = loop["desk"]
    os.environ.update(ray.get(desk.environment.remote()))
    _hush()
    try:
        _enter(loop["workspace"])
        config = resolve(loop["kind"]).model_validate_json(loop["config"])
        context = joined_context(stopping=_stop_told(desk), open_log=_log_opener(loop))
        rank, size = context.rank, context.world_size
        say("worker", rank=rank, process=os.getpid(), workers=size, node=_node())
        with peers_watched(context):
            result = resolve(loop["entry"])(config, context)
        if context.is_main:
            stored = _send_home(loop)
            kept = getattr(config, "checkpoints", None)
            if stored and kept:  # until the driver has the result, the store has the last one too
                clear_checkpoints(kept)
            ray.get(desk.finish.remote({"result": result, "stored": stored}))
    except StoppedError as error:
        if not ray.get(desk.stopping.remote()):
            raise PreemptedError(str(error)) from None
    except PipelineError as error:
        ray.get(desk.fail.remote(type(error).__name__, str(error)))
        time.sleep(_END_SECONDS)  # the driver says it, and ends us all
        raise
    except LostPeerError:
        time.sleep(_END_SECONDS)  # whoever was lost has the story, and Ray ends us all
        raise
    except FaultError as error:
        ray.get(desk.fault.remote(f"{_worker()} ended: {error}."))
        raise
    except Exception as error:
        words = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        ray.get(desk.fault.remote(f"{_worker()} ended: {words}."))
        traceback.print_exc()
        raise


class JournalCallback(UserCallback):
    """On the driver's machine: what the main worker reports goes into the run's journal there.

    The run in MLflow is the driver's, which forwards the journal; workers that start again write
    into the same one. Failures of the workers are counted at the desk.
    """

    def __init__(self, desk: Any) -> None:
        self._desk = desk

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Count a failure, but not machines that went away with notice."""
        errors = list(worker_exceptions.items())
        if any("PreemptedError" in f"{type(e).__name__} {e}" for _, e in errors):
            self._desk.moved.remote("the workers' machines are going away.")
            return
        how = [describe(rank, error) for rank, error in sorted(errors)]
        self._desk.failed.remote(f"{how[0] if how else 'the workers could not be started'}.")

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Append the points of one report."""
        for told in metrics:
            if not told.get("points"):
                continue
            journal = Journal(Path(told["journal"]))
            for point in told["points"]:
                journal.append(Point(**point))
            journal.close()


def describe(rank: int, error: Exception) -> str:
    """Which worker ended, and how."""
    if "Actor" in type(error).__name__ or "actor died" in str(error):
        return f"worker {rank} died: it was killed, or its node is gone"
    last = (str(error).strip().splitlines() or ["without a word"])[-1][:300]
    return f"worker {rank} ended: {last}"


class _RayLog:
    """Collects the main worker's points; at each checkpoint all workers report to the driver."""

    def __init__(self, path: Path | None, desk: Any, base: Path) -> None:
        self._path, self._desk = None if path is None else base / path, desk
        self._points: list[dict[str, Any]] = []

    def write(self, point: Point) -> None:
        """Keep one point until the next checkpoint."""
        if self._path is not None:
            self._points.append(asdict(point))

    def flush(self, step: int) -> bool:
        """Report what there is; True if Ray says that these machines are going away."""
        train.report({"points": self._points, "journal": str(self._path or "")})
        self._points = []
        if train.get_context().get_world_rank() == 0:
            self._desk.reach.remote(step)
        return train.get_preemption_info() is not None

    def close(self) -> None:
        """Report the rest."""
        train.report({"points": self._points, "journal": str(self._path or "")})
        self._points = []


def _log_opener(loop: Mapping[str, Any]) -> Any:
    return lambda path: _RayLog(path, loop["desk"], Path(loop["journals"]))


def _enter(workspace: str) -> None:
    """Go to the folder that the job's paths are relative to."""
    try:
        os.chdir(workspace)
    except OSError as error:
        raise ConfigError(
            f"node {_node()} has no folder {workspace} ({error.strerror}). Mount the driver's "
            "working folder there, or keep a clone with the same data on every node and set "
            "METALOOM_WORKSPACE to its path."
        ) from None


def _hush() -> None:
    """Ray prints every report that a worker makes; its files keep them."""
    for name in ("", "ray", "ray.train"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is not logging.FileHandler:
                handler.addFilter(lambda record: record.levelno >= logging.WARNING)


def _worker() -> str:
    return f"worker {train.get_context().get_world_rank()}"


def _node() -> str:
    return str(ray.util.get_node_ip_address())


def _stop_told(desk: Any) -> Any:
    """Whether the driver was asked to stop, or Ray says that these machines are going away.

    A thread looks from time to time: a notice may be shorter than the way to the next checkpoint.
    """
    asked = threading.Event()
    # Not public: what is public asks all workers at once, and can be asked at checkpoints alone.
    notice = get_internal_train_context().preemption_context

    def listen() -> None:
        while not asked.wait(_POLL_SECONDS):
            if notice.preemption_info is not None:
                asked.set()
            with suppress(ray.exceptions.RayError):  # it may answer the next time; or Ray ends us
                if ray.get(desk.stopping.remote(), timeout=_ANSWER_SECONDS):
                    asked.set()

    threading.Thread(target=listen, daemon=True, name="stop").start()
    return asked.is_set


def _send_home(loop: Mapping[str, Any]) -> str | None:
    """Put the outputs into the object store, unless the driver sees this machine's folders."""
    outputs = [Path(path) for path in loop["outputs"]]
    if not outputs or Path(loop["token"]).exists():
        return None
    storage = storage_from_environment()
    if storage is None:
        raise ConfigError(
            "the main worker runs on a node that does not share the driver's folders, so its "
            "results cannot come home. Set METALOOM_STORAGE to s3://bucket/path (or file:/// on a "
            "mounted disk)."
        )
    name = f"outputs/{uuid.uuid4().hex}"
    put_outputs(storage, outputs, name)
    return name
