"""Workers as actors of a Ray cluster, under Ray Train.

Ray places the workers and starts them again when one, or its node, is gone. What a run goes on from
is decided by our own checkpoints, never by Ray's snapshot.
"""

from __future__ import annotations

import os
import socket
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.core import errors
from pipeline.core.errors import (
    ConfigError,
    PipelineError,
    StorageError,
    TrainingError,
)
from pipeline.core.files import write_bytes
from pipeline.core.ray_cluster import ray_cluster
from pipeline.launch.base import Job
from pipeline.launch.local import (
    WORKER_ENVIRONMENT,
    did_not_stop,
    prepare,
    stop_asked,
    stopped_as_asked,
)
from pipeline.launch.outputs import fetch_output
from pipeline.launch.ray_desk import ask, open_desk, watched, went_away
from pipeline.runtime.context import timeout_from_environment
from pipeline.runtime.storage import storage_from_environment

_PASSED_ON = ("METALOOM_STORAGE", "METALOOM_TIMEOUT_SECONDS")
"""By the desk: what Ray sets for a process it writes into its logs, and a run's arguments into its
state, which the dashboard shows."""
_RAYS_OWN_TIMEOUTS = {
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": 5.0,
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": 30.0,
}
"""Of its reports and health checks, which wait for a stopped worker without end, or ten minutes:
seconds beyond our own timeout, which names the worker."""
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
    for name, more in _RAYS_OWN_TIMEOUTS.items():
        os.environ.setdefault(name, str(timeout_from_environment() + more))
    failure: list[BaseException] = []
    with ray_cluster(show_workers=True) as ray, stop_asked() as asked, _presence() as token:
        desk = open_desk(ray, job, _passed_on(os.environ))
        with watched(ray, desk, asked) as gone:
            try:
                _trainer(job, folder, token, desk).fit()
            except PipelineError:
                raise
            except (Exception, SystemExit) as error:  # Ray leaves by the latter when interrupted
                failure.append(error)
        if gone.is_set():
            raise went_away()
        told = ask(ray, desk)
    stopping = asked()
    _raise_what_is_told(told.error)
    if told.result is None and stopping:
        raise did_not_stop(told.progress) if failure else stopped_as_asked(told.progress)
    if told.result is None and (not failure or isinstance(failure[0], SystemExit)):
        raise KeyboardInterrupt
    if told.result is None:
        raise TrainingError(
            f"{_cause(failure[0])}. Run the same command again: it resumes from the last "
            "checkpoint."
        )
    _bring_home(job, told.result["stored"])
    return told.result["result"]


@contextmanager
def _presence() -> Iterator[Path]:
    """A file in the driver's working folder; a worker that sees it in its own shares it."""
    here = socket.gethostname()
    shown = Path(".metaloom") / f"driver-{uuid.uuid4().hex}"
    for old in shown.parent.glob("driver-*"):
        with suppress(FileNotFoundError):  # its driver has just ended
            host, _, pid = old.read_text().partition(" ")
            if host == here and pid.isdecimal() and not _lives(int(pid)):
                old.unlink()
    write_bytes(shown, f"{here} {os.getpid()}".encode())
    try:
        yield shown
    finally:
        shown.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """What workers read of the driver's environment; keys only where they have a use for them."""
    stored = bool(environment.get("METALOOM_STORAGE"))
    return {
        name: value
        for name, value in environment.items()
        if name in _PASSED_ON or (stored and name.startswith("AWS_"))
    }


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
        name = f"{stored}/{index}"
        with _explained(storage.uri, stored):
            fetch_output(storage, name, target)
        try:
            storage.remove(name)
        except OSError as error:
            why = str(error).partition("\n")[0]
            print(
                f"warning: {storage.uri}/{name} could not be removed ({why}); the run has ended "
                "well and does not need it. Delete it.",
                file=sys.stderr,
            )
