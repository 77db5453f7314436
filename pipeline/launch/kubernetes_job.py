"""Workers in pods: a RayJob for each job, made of the suspended one of the manifests.

Code and data travel through the object store, and so do journal, progress, result and outputs: the
driver may be a pod of the cluster, or a laptop that reaches its API server.
"""

from __future__ import annotations

import os
import queue
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cluster.kube.api import Kube
from pipeline.cluster.kube.connect import connect
from pipeline.cluster.kube.errors import ApiError
from pipeline.cluster.kube.kinds import RAY_JOBS
from pipeline.cluster.kube.ray_jobs import (
    delete_ray_job,
    describe_end,
    has_ended,
    is_queued,
    ray_job_name,
    ray_job_of,
    ray_trouble,
    start_ray_job,
    template_ray_job,
)
from pipeline.cluster.kube.watch import changes_of
from pipeline.core import errors
from pipeline.core.errors import (
    ConfigError,
    MachineError,
    StoppedError,
    StorageError,
    TrainingError,
)
from pipeline.core.files import read_json
from pipeline.launch.base import Job
from pipeline.launch.kubernetes_entry import OUTCOME
from pipeline.launch.live import Live, append_points
from pipeline.launch.local import STOP_SECONDS, stop_asked, stopped_as_asked
from pipeline.launch.outputs import fetch_output
from pipeline.launch.workspace import JOB, Packed, pack
from pipeline.runtime.logs import say, warn
from pipeline.runtime.storage import Storage, storage_from_environment

_ENTRYPOINT = "python -m pipeline.launch.kubernetes_entry"
_PATIENCE_SECONDS = 300.0
"""An API server may be away for minutes while its cluster is upgraded; training goes on."""
_POLL_SECONDS = 0.5
_ASK_SECONDS = 2.0
_LOOK_SECONDS = 15.0
_SETTLE_SECONDS = 30.0
"""Between KubeRay's word that a job has ended and the moment when its result is seen."""
_STARTING = ("", "Initializing", "Waiting", "Retrying")
_PASSED_ON = ("METALOOM_TIMEOUT_SECONDS", "METALOOM_NUM_WORKERS")


def launch_kubernetes(job: Job, folder: Path) -> Any:
    """Run the job as a RayJob in the cluster of the kubeconfig, or of the pod that we are in.

    METALOOM_STORAGE names the object store that driver and pods share, METALOOM_NAMESPACE the
    namespace (default: the context's), METALOOM_PENDING_SECONDS how long pods may wait for room.

    Raises:
        PipelineError: a worker's own; or the cluster's.
        StoppedError: this process was asked to stop, and the workers did.
    """
    storage = storage_from_environment()
    if storage is None:
        raise ConfigError(
            "METALOOM_LAUNCHER is kubernetes, and code and data travel through an object store. "
            "Set METALOOM_STORAGE to s3://bucket/path, which the pods reach too."
        )
    kube = connect(os.environ.get("METALOOM_NAMESPACE"), patience_seconds=_PATIENCE_SECONDS)
    template = template_ray_job(kube)
    packed = pack(job, storage)
    with stop_asked() as asked:
        run = _begin(kube, storage, packed, template, job)
        try:
            outcome = _follow(run, asked)
        except BaseException as error:
            if _is_final(error):
                _clear(run)
            raise
        result = _bring_home(run, outcome, job, folder)
    _clear(run)
    return result


@dataclass
class _Run:
    kube: Kube
    storage: Storage
    packed: Packed
    item: dict[str, Any]
    journal: Path | None
    live: Live
    said: dict[str, Any] = field(default_factory=dict)


def _begin(
    kube: Kube, storage: Storage, packed: Packed, template: Mapping[str, Any], job: Job
) -> _Run:
    """The RayJob of this job: one that a driver before us made is taken as it is.

    A result without a RayJob is what such a driver had no time to bring home; an error without one
    is an old story.
    """
    name = ray_job_name(packed.digest)
    passed = {k: v for k in _PASSED_ON if (v := os.environ.get(k))}
    environment = {
        **passed,
        JOB: packed.digest,
        "METALOOM_STORAGE": storage.uri,
    }
    wanted = ray_job_of(
        template,
        name,
        entrypoint=_ENTRYPOINT,
        environment=environment,
        code=_workspace(template),
    )
    live = Live(storage, packed)
    there = {item["metadata"]["name"] for item in kube.select(RAY_JOBS)}
    if name not in there:
        _forget(storage, packed, live)
    item, new = start_ray_job(kube, wanted)
    say("RayJob", name=name, namespace=kube.namespace, found=str(not new).lower())
    return _Run(kube, storage, packed, item, getattr(job.config, "journal", None), live)


def _workspace(template: Mapping[str, Any]) -> str:
    """Where the template's head has its workspace: code is taken from there, not from the image."""
    pod = template["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    told = {e["name"]: e.get("value") for e in pod["containers"][0].get("env", [])}
    return str(told.get("METALOOM_WORKSPACE") or pod["containers"][0].get("workingDir") or ".")


def _forget(storage: Storage, packed: Packed, live: Live) -> None:
    """What an earlier run of the same job left, but its code and data."""
    with _explained(storage):
        storage.remove(packed.at("result"))
        live.clear()


def _follow(run: _Run, asked: Callable[[], bool]) -> dict[str, Any]:
    """Wait for the outcome, pass on what the run tells, and what keeps it from running."""
    name = run.item["metadata"]["name"]
    begun = heard = looked = time.monotonic()
    ended = stopping = 0.0
    with changes_of(run.kube, RAY_JOBS, name) as changes:
        while True:
            _take_changes(run, changes)
            now = time.monotonic()
            if now - heard >= _ASK_SECONDS:
                heard = now
                if (outcome := _ask(run)) is not None:
                    return outcome
            if not _waits(run):
                begun = now
            if now - looked >= _LOOK_SECONDS:
                looked = now
                _look(run, now - begun)
            if asked() and not stopping:
                stopping = now
                _ask_to_stop(run)
            if stopping and (_waits(run) or is_queued(run.item)):
                raise stopped_as_asked(0)
            if stopping and now - stopping > STOP_SECONDS:
                raise StoppedError(
                    f"asked to stop, but no step ended within {STOP_SECONDS:g} s. Run the same "
                    "command again: it goes on from the last checkpoint."
                )
            if has_ended(run.item):
                ended = ended or now
                if now - ended > _SETTLE_SECONDS:
                    raise TrainingError(
                        f"the RayJob {name} ended without a result: "
                        f"{describe_end(run.kube, run.item)}. Run the same command again: it "
                        "resumes from the last checkpoint."
                    )


def _take_changes(run: _Run, changes: queue.SimpleQueue[Any]) -> None:
    try:
        change = changes.get(timeout=_POLL_SECONDS)
    except queue.Empty:
        return
    if isinstance(change, ApiError):
        raise change
    name = run.item["metadata"]["name"]
    if change.what == "DELETED" and change.item["metadata"]["uid"] == run.item["metadata"]["uid"]:
        raise TrainingError(
            f"the RayJob {name} was deleted while it ran. Run the same command again: it resumes "
            "from the last checkpoint."
        )
    if change.what != "DELETED":
        run.item = dict(change.item)


def _status(run: _Run) -> str:
    return str((run.item.get("status") or {}).get("jobDeploymentStatus") or "")


def _waits(run: _Run) -> bool:
    """Its pods have not all found their place yet."""
    return _status(run) in _STARTING and not is_queued(run.item)


def _ask(run: _Run) -> dict[str, Any] | None:
    """News of the run, from the store; one that does not answer now will later."""
    try:
        append_points(run.live.take_points(), run.journal)
        progress = run.live.progress()
        if progress and progress != run.said:
            run.said = progress
            say(**{k: v for k, v in progress.items() if v is not None})
        if "result" not in run.storage.names(run.packed.folder):
            return None
        append_points(run.live.take_points(), run.journal)
        return _outcome(run)
    except OSError as error:
        warn(f"{run.storage.uri} does not answer ({str(error)[:200]}); the run goes on.")
        return None


def _outcome(run: _Run) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        run.storage.get(run.packed.at("result"), Path(scratch) / "result")
        found: dict[str, Any] = read_json(Path(scratch) / "result" / OUTCOME)
        return found


def _look(run: _Run, waited: float) -> None:
    """Say what keeps pods from running; give up when they have waited for too long."""
    trouble = ray_trouble(run.kube, run.item)
    if trouble and trouble != run.said.get("trouble"):
        run.said = {**run.said, "trouble": trouble}
        warn(trouble)
    limit = pending_seconds()
    if _waits(run) and waited > limit:
        raise MachineError(
            f"the pods of {run.item['metadata']['name']} have not started within {limit:g} s: "
            f"{trouble or 'nothing says why'} (METALOOM_PENDING_SECONDS is how long they may take)"
        )


def pending_seconds() -> float:
    """METALOOM_PENDING_SECONDS, or an hour.

    Raises:
        ConfigError: it is no number.
    """
    value = os.environ.get("METALOOM_PENDING_SECONDS") or "3600"
    try:
        return float(value)
    except ValueError:
        raise ConfigError(
            f"METALOOM_PENDING_SECONDS is {value!r}. Set it to a number of seconds, or unset it."
        ) from None


def _ask_to_stop(run: _Run) -> None:
    try:
        run.live.ask_to_stop()
    except OSError as error:
        warn(f"{run.storage.uri} does not take the wish to stop ({str(error)[:200]})")


def _is_final(error: BaseException) -> bool:
    """The RayJob goes; not when only we lost sight of it: the same command finds it again."""
    return isinstance(error, (TrainingError, MachineError, KeyboardInterrupt)) and not isinstance(
        error, (ApiError, StorageError)
    )


def _bring_home(run: _Run, outcome: dict[str, Any], job: Job, folder: Path) -> Any:
    """The outputs, and the result; an error of the workers is raised here.

    Raises:
        PipelineError: as the workers said it.
    """
    if "error" in outcome:
        _clear(run)
        kind = getattr(errors, str(outcome["error"]), TrainingError)
        raise kind(outcome["message"])
    with _explained(run.storage):
        for index, target in enumerate(job.outputs):
            fetch_output(run.storage, f"{run.packed.at('outputs')}/{index}", target)
    return outcome["result"]


@contextmanager
def _explained(storage: Storage) -> Iterator[None]:
    """An OSError of the store, said in a way that tells how to go on."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{storage.uri} does not answer: {error}. Mend that, then run the same command again: "
            "it goes on where it was."
        ) from None


def _clear(run: _Run) -> None:
    """The RayJob and what it left in the store; both would only be in the way of the next run."""
    try:
        delete_ray_job(run.kube, run.item)
    except ApiError as error:
        warn(f"the RayJob {run.item['metadata']['name']} could not be deleted: {error}")
    try:
        run.storage.remove(run.packed.at("result"))
        run.storage.filesystem.delete_dir(f"{run.storage.base}/{run.packed.folder}")
    except OSError as error:
        warn(f"{run.storage.uri}/{run.packed.folder} could not be removed: {error}")
