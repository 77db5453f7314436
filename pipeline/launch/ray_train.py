"""Workers as actors of a Ray cluster, under Ray Train.

Ray places the workers and starts them again when one, or its node, is gone. What a run goes on from
is decided by our own checkpoints, never by Ray's snapshot.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core import errors
from pipeline.core.errors import (
    ConfigError,
    PipelineError,
    StoppedError,
    StorageError,
    TrainingError,
)
from pipeline.core.ray_cluster import ray_cluster
from pipeline.launch.attempts import Attempts
from pipeline.launch.base import Job
from pipeline.launch.local import WORKER_ENVIRONMENT, prepare, stop_asked
from pipeline.runtime.context import timeout_from_environment
from pipeline.runtime.logs import say
from pipeline.runtime.mirror import storage_from_environment

_POLL_SECONDS = 0.25
_STOP_SECONDS = 60.0
_PASSED_ON = ("AWS_", "METALOOM_")
"""By the workers' own argument: what Ray sets for a process it also writes into its logs."""
_SET_EARLY = ("GLOO_", "NCCL_", "CUBLAS_")


def launch_ray_train(job: Job, folder: Path) -> Any:
    """Run the job as a Ray Train run on the cluster of RAY_ADDRESS, or on one of this machine.

    METALOOM_NODE_LABELS (`key=value,...`) says on which nodes; METALOOM_STORAGE (s3://bucket/path)
    is needed where the nodes do not share this machine's folder.

    Raises:
        PipelineError: a worker's own; or too many starts came to nothing.
        MachineError: Ray is not installed, or there is no such cluster.
        StoppedError: this process was asked to stop, and the workers did.
    """
    prepare(job, folder)
    failure: list[BaseException] = []
    with ray_cluster(show_workers=True) as ray, stop_asked() as asked, _token() as token:
        desk = _open_desk(ray, job)
        ended = threading.Event()
        watcher = threading.Thread(target=_watch, args=(ray, desk, asked, ended), daemon=True)
        watcher.start()
        try:
            _trainer(job, folder, token, desk).fit()
        except PipelineError:
            raise
        except (Exception, SystemExit) as error:  # Ray leaves by the latter when it is interrupted
            failure.append(error)
        finally:
            ended.set()
            watcher.join()
        told = ray.get([desk.error.remote(), desk.result.remote(), desk.progress.remote()])
    error_told, done, progress = told
    stopping = asked()
    _raise_what_is_told(error_told)
    if done is None and stopping:
        raise StoppedError(
            f"stopped behind the checkpoint of step {progress}, as asked. Run the same command "
            "again to go on."
        )
    if done is None and (not failure or isinstance(failure[0], SystemExit)):
        raise KeyboardInterrupt
    if done is None:
        raise TrainingError(
            f"{_cause(failure[0])}. Run the same command again: it resumes from the last "
            "checkpoint."
        )
    _bring_home(job, done["stored"])
    return done["result"]


class _Desk:
    """An actor beside the driver: what the workers and the driver tell each other."""

    def __init__(self, max_restarts: int) -> None:
        self._max_restarts = max_restarts
        self._attempts, self._cause, self._told = Attempts(), "the workers ended.", ""
        self._progress = 0
        self._restarts: list[tuple[int, str]] = []
        self._error: dict[str, str] | None = None
        self._result: dict[str, Any] | None = None
        self._stop = False

    def failed(self, cause: str) -> None:
        """A group of workers has failed, not gone because of its machines."""
        self._attempts = self._attempts.begin(self._progress)
        self._cause = self._told or cause
        self._told = ""
        if self._attempts.count > self._max_restarts:
            starts = f" ({self._attempts.count} starts from step {self._progress})"
            self.fail(
                "TrainingError",
                f"{self._cause} Run the same command again: it resumes from the last checkpoint"
                f"{starts if self._max_restarts else ''}.",
            )
        else:
            self._restarts.append((self._progress, self._cause))

    def moved(self, why: str) -> None:
        """The workers' machines go away with notice, which is no failure."""
        self._restarts.append((self._progress, why))

    def restarts(self) -> list[tuple[int, str]]:
        """For each new start of the workers: from which step, and why."""
        return self._restarts

    def reach(self, step: int) -> None:
        """There is a checkpoint of this step."""
        self._progress = step

    def fault(self, message: str) -> None:
        """Why the workers have to be started again."""
        self._told = message

    def fail(self, kind: str, message: str) -> None:
        """An error that no new start would mend."""
        self._error = self._error or {"kind": kind, "message": message}

    def finish(self, result: dict[str, Any]) -> None:
        """The run has ended well."""
        self._result = result

    def stop(self) -> None:
        """The driver was asked to stop."""
        self._stop = True

    def stopping(self) -> bool:
        """Whether the workers have to stop."""
        return self._stop

    def error(self) -> dict[str, str] | None:
        """What was failed with."""
        return self._error

    def result(self) -> dict[str, Any] | None:
        """What it finished with."""
        return self._result

    def progress(self) -> int:
        """Step of the last checkpoint."""
        return self._progress


@contextmanager
def _token() -> Iterator[Path]:
    """A file in the driver's working folder; a worker that sees it in its own shares it."""
    token = Path(".metaloom") / f"driver-{uuid.uuid4().hex}"
    token.parent.mkdir(exist_ok=True)
    token.touch()
    try:
        yield token
    finally:
        token.unlink()


def _open_desk(ray: Any, job: Job) -> Any:
    """On the driver's node, so that no other node's death takes it away."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0)(_Desk).options(scheduling_strategy=here)
    return actor.remote(job.max_restarts)


def _watch(ray: Any, desk: Any, asked: Callable[[], bool], ended: threading.Event) -> None:
    """Pass on that the driver was asked to stop; say why workers start again; end a failed run.

    Ray Train restarts whatever fails; Ctrl-C is the way by which it lets a run be given up.
    """
    stopping, said = 0.0, 0
    while not ended.wait(_POLL_SECONDS):
        if asked() and not stopping:
            stopping = time.monotonic()
            desk.stop.remote()
        late = stopping and time.monotonic() - stopping > _STOP_SECONDS
        error, restarts = ray.get([desk.error.remote(), desk.restarts.remote()])
        for step, why in restarts[said:]:
            say("restart", step=step, why=why)
        said = len(restarts)
        if (late or error is not None) and not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            return


def _trainer(job: Job, folder: Path, token: Path, desk: Any) -> Any:
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipeline.launch.ray_worker import JournalCallback, work

    kind = type(job.config)
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    storage = storage_from_environment()
    number = job.num_workers
    environment = {k: v for k, v in os.environ.items() if k.startswith(_SET_EARLY)}
    if ray.util.get_node_ip_address().startswith("127."):
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    loop = {
        "entry": job.entry,
        "kind": f"{kind.__module__}:{kind.__qualname__}",
        "config": job.config.model_dump_json(),
        "outputs": [str(path) for path in job.outputs],
        "workspace": os.environ.get("METALOOM_WORKSPACE") or str(Path.cwd()),
        "token": str(token),
        "journals": str(Path.cwd()),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON)},
        "desk": desk,
    }
    restarts = -1 if job.max_restarts else 0  # how many are too many, the desk decides
    return TorchTrainer(
        work,
        train_loop_config=loop,
        scaling_config=ScalingConfig(
            num_workers=number if job.min_workers is None else (job.min_workers, number),
            use_gpu=has_gpus,
            resources_per_worker={"GPU": 1} if has_gpus else {"CPU": 1},
            label_selector=_labels() or None,
            elastic_resize_monitor_interval_s=10.0,
        ),
        run_config=RunConfig(
            name=f"metaloom-{uuid.uuid4().hex[:12]}",
            storage_path=f"{storage.base}/ray" if storage else str((folder / "ray").resolve()),
            storage_filesystem=storage.filesystem if storage else None,
            failure_config=FailureConfig(
                max_failures=restarts,
                controller_failure_limit=job.max_restarts,
                max_preemption_failures=-1,
                preemption_grace_s=30.0,
            ),
            callbacks=[JournalCallback(desk)],
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": {**environment, **WORKER_ENVIRONMENT}},
        ),
        torch_config=TorchConfig(
            backend="nccl" if has_gpus else "gloo",
            timeout_s=max(1, int(timeout_from_environment())),
        ),
    )


def _labels() -> dict[str, str]:
    """METALOOM_NODE_LABELS: which nodes may hold workers."""
    text = os.environ.get("METALOOM_NODE_LABELS", "")
    pairs = [part.partition("=") for part in text.split(",") if part]
    if any(not (key.strip() and sign and value.strip()) for key, sign, value in pairs):
        raise ConfigError(
            f"METALOOM_NODE_LABELS is {text!r}. Write <label>=<value>, with commas between several."
        )
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cause(failure: BaseException) -> str:
    """Why Ray gave up; workers that lost another one wait, so Ray tells of that one first."""
    from pipeline.launch.ray_worker import describe

    workers = getattr(failure, "worker_failures", None)
    if not workers:
        return f"Ray Train gave the run up: {str(failure).strip().splitlines()[-1][:300]}"
    return describe(*min(workers.items()))


def _raise_what_is_told(told: dict[str, str] | None) -> None:
    if told is not None:
        raise getattr(errors, told["kind"], TrainingError)(told["message"])


@contextmanager
def _explained(uri: str, stored: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"the run has ended, but its results in {uri}/{stored} cannot be fetched: {error}. "
            "Mend that, then run the same command again: it goes on from the last checkpoint."
        ) from None


def _bring_home(job: Job, stored: str | None) -> None:
    """Fetch what the main worker left on a machine that does not share this one's folders."""
    storage = storage_from_environment()
    if stored is None or storage is None:
        return
    for index, target in enumerate(job.outputs):
        with tempfile.TemporaryDirectory() as scratch, _explained(storage.uri, stored):
            sealed = Path(scratch) / "sealed"
            storage.get(f"{stored}/{index}", sealed)
            content = sealed / "content"  # of a folder that was not sealed itself
            found = content if content.is_dir() else sealed
            shutil.copytree(found, target, dirs_exist_ok=True)
        storage.remove(f"{stored}/{index}")
