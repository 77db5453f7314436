"""The MLflow side of tracking: the only module of the pipeline's runtime that imports it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from pipeline.core.errors import RegistryError
from pipeline.runtime import lineage
from pipeline.runtime.journal import Point
from pipeline.runtime.tracking import FAILED, INCOMPLETE_TAG, KILLED, RunIds, RunStart

EXPERIMENT = "metaloom"
METRICS_IN_A_BATCH = 1000
ENTRIES_IN_A_BATCH = 100
DIGEST_CHARACTERS = 32
MAX_NAME_CHARACTERS = 250
SYSTEM_METRICS_SECONDS = 3
_SQLITE = "sqlite:///"

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # A dead server blocks one call for 246 s with the defaults.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",
}


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or a database in the repository; a sqlite path is made absolute."""
    base = lineage.home(root)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}mlflow.db"
    if not uri.startswith(_SQLITE):
        return uri
    return f"{_SQLITE}{base / unquote(uri.removeprefix(_SQLITE))}"


def shown_uri(root: Path) -> str:
    """The tracking server for people and records: no password, no path outside the repository."""
    uri = tracking_uri(root)
    if uri.startswith(_SQLITE):
        path = Path(uri.removeprefix(_SQLITE))
        base = lineage.home(root)
        return f"{_SQLITE}{path.relative_to(base) if path.is_relative_to(base) else path}"
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def quiet_environment() -> dict[str, str]:
    """Settings for every process that runs MLflow for us; what the user has set stays."""
    return {name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()}


def connect(root: Path) -> Any:
    """A client of the tracking server and registry, its database made if it is a new local file.

    Raises:
        RegistryError: the address or the database cannot be used.
    """
    os.environ.update(quiet_environment())
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns that labels may be text or integers, which is what we want.
    logging.getLogger("mlflow.types.type_hints").setLevel(logging.ERROR)
    uri = tracking_uri(root)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    with _one_at_a_time(uri):
        try:
            client = mlflow.MlflowClient(uri, uri)
            if uri.startswith(_SQLITE):
                client.search_registered_models(max_results=1)
        except mlflow.exceptions.MlflowException as error:
            shown = shown_uri(root)
            raise RegistryError(f"MLflow at {shown} cannot be used: {error}") from None
    return client


def experiment_id(client: Any, root: Path) -> str:
    """The experiment that runs belong to (MLFLOW_EXPERIMENT_NAME, or `metaloom`), made if new."""
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location=_artifacts(root, name)))
    except MlflowException:
        # Another process made it between the two calls, or there is a real fault to raise.
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        raise


def _artifacts(root: Path, experiment: str) -> str | None:
    """Beside a local database, to be found from any working folder; a server decides itself."""
    uri = tracking_uri(root)
    if not uri.startswith(_SQLITE):
        return None
    return (Path(uri.removeprefix(_SQLITE)).parent / "mlartifacts" / experiment).as_uri()


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Two processes that make the tables of one new sqlite file break each other; let one wait."""
    if not uri.startswith(_SQLITE):
        yield
        return
    database = Path(uri.removeprefix(_SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f"{database.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class MlflowTracker:
    """Runs in MLflow; see `tracking.Tracker`."""

    def __init__(self, root: Path) -> None:
        self._client = connect(root)
        self._experiment = experiment_id(self._client, root)
        self._monitor: Any = None
        self._late = False
        """Whether the stage had ended before we came to say that it began."""

    def start(self, run: RunStart, known: RunIds | None = None) -> RunIds:
        """Open the child run under the pipeline's run, with params, tags and data sets."""
        self._late = not run.process or lineage.has_ended(run.process)
        if not self._late:
            self._close_stale(run)
        ids = self._still_there(run, known) or self._open(run)
        if not self._late:
            self._client.set_tag(ids.parent, "metaloom.process", run.owner)
            self._client.update_run(ids.parent, status="RUNNING")
        self._log_in_batches(ids.child, params=run.params, tags=run.tags)
        self._client.log_inputs(ids.child, datasets=_datasets(run))
        self._watch_system(ids.child)
        return ids

    def log(self, ids: RunIds, points: Sequence[Point]) -> None:
        """Record points, at most METRICS_IN_A_BATCH values a call (repeats are the same rows)."""
        from mlflow.entities import Metric

        self._watch_system(ids.child)
        rows = [
            Metric(_name(name), float(value), int(point.time * 1000), point.step)
            for point in points
            for name, value in point.metrics.items()
            if isinstance(value, int | float)
        ]
        for first in range(0, len(rows), METRICS_IN_A_BATCH):
            self._client.log_batch(ids.child, metrics=rows[first : first + METRICS_IN_A_BATCH])

    def link(self, ids: RunIds, outputs: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """Tag the pipeline's run with the makers of its restored stages, and them with it."""
        ran = self._ran(ids.parent)
        makers = {
            stage: self._maker(hashes) or "unknown"
            for stage, hashes in outputs.items()
            if not any(_is_run_of(run, stage, hashes) for run in ran)
        }
        for stage, maker in makers.items():
            self._client.set_tag(ids.parent, _name(f"restored.{stage}"), maker)
            if maker != "unknown":
                self._client.set_tag(maker, f"reused_by.{ids.parent}", stage)
        return makers

    def finish(self, ids: RunIds, status: str, tags: Mapping[str, str], ended: float) -> None:
        """Close the child, and the parent with the same status.

        When this is said late, other stages may have come after: then the parent, unless it is
        open still, stays as they left it.
        """
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        # First of all the status: whatever else fails, no run may look as if it were going on.
        self._client.set_terminated(ids.child, status, int(ended * 1000))
        if not self._late or self._client.get_run(ids.parent).info.status == "RUNNING":
            self._client.set_terminated(ids.parent, status, int(ended * 1000))
        self._log_in_batches(ids.child, tags=tags)
        self._drop_twins(ids.child)
        self._copy_summary(ids)
        if INCOMPLETE_TAG not in tags and INCOMPLETE_TAG in self._tags(ids.child):
            self._client.delete_tag(ids.child, INCOMPLETE_TAG)

    def _still_there(self, run: RunStart, known: RunIds | None) -> RunIds | None:
        """The runs that an earlier recorder had begun, if this server has them."""
        from mlflow.exceptions import MlflowException

        try:
            ours = known is not None and self._tags(known.child).get("metaloom.key") == run.key
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return known if ours else None

    def _open(self, run: RunStart) -> RunIds:
        parent = self._parent(run)
        child = self._find({"metaloom.key": run.key}) or self._create_child(run, parent)
        return RunIds(parent, child)

    def _drop_twins(self, child: str) -> None:
        """A run that was made, though the answer never came, was made again: keep one."""
        key = self._tags(child)["metaloom.key"]
        for twin in self._search(f"tags.`metaloom.key` = '{_quoted(key)}'"):
            if twin.info.run_id != child:
                self._client.delete_run(twin.info.run_id)

    def _tags(self, run_id: str) -> Mapping[str, str]:
        tags: Mapping[str, str] = self._client.get_run(run_id).data.tags
        return tags

    def _parent(self, run: RunStart) -> str:
        """The pipeline's run: found by its key, made by whichever stage comes first."""
        key = run.pipeline or run.key
        if found := self._find({"metaloom.pipeline": key, "metaloom.role": "pipeline"}):
            return found
        tags = {
            "metaloom.pipeline": key,
            "metaloom.process": run.owner,
            "metaloom.role": "pipeline",
            "mlflow.source.git.commit": run.tags.get("git.commit", "none"),
            **{key: value for key, value in run.tags.items() if key.startswith(("git.", "code."))},
        }
        began = time.localtime(run.began or time.time())
        name = os.environ.get("DVC_EXP_NAME") or time.strftime("pipeline-%Y%m%d-%H%M%S", began)
        return self._create(run, name, tags)

    def _create_child(self, run: RunStart, parent: str) -> str:
        tags = {
            "mlflow.parentRunId": parent,
            "mlflow.source.name": f"stages/{run.stage.partition('@')[0]}.py",
            "mlflow.source.git.commit": run.tags.get("git.commit", "none"),
            "metaloom.role": "stage",
            "metaloom.stage": run.stage,
            "metaloom.key": run.key,
            "metaloom.pipeline": run.pipeline,
            "metaloom.process": run.process,
        }
        return self._create(run, run.stage, tags)

    def _create(self, run: RunStart, name: str, tags: Mapping[str, str]) -> str:
        began = int((run.began or time.time()) * 1000)
        created = self._client.create_run(
            self._experiment, start_time=began, tags=dict(tags), run_name=name
        )
        return str(created.info.run_id)

    def _close_stale(self, run: RunStart) -> None:
        """Close runs of ours that are still open though their process has ended."""
        for stale in self._search("attributes.status = 'RUNNING'"):
            process = stale.data.tags.get("metaloom.process", "")
            if stale.data.tags.get("metaloom.pipeline") != run.pipeline and lineage.has_ended(
                process
            ):
                self._client.set_terminated(stale.info.run_id, KILLED)

    def _ran(self, parent: str) -> list[Any]:
        """Runs of stages of this pipeline run that have not failed."""
        runs = self._search(f"tags.`mlflow.parentRunId` = '{parent}'")
        return [run for run in runs if run.info.status not in {FAILED, KILLED}]

    def _maker(self, hashes: Mapping[str, str]) -> str | None:
        """The newest finished run that left one of these outputs with this content."""
        for path, digest in hashes.items():
            if found := self._find({f"output.{path}": digest}, "attributes.status = 'FINISHED'"):
                return found
        return None

    def _copy_summary(self, ids: RunIds) -> None:
        """Put the stage's last metrics on the pipeline's run too, under the stage's name."""
        from mlflow.entities import Metric

        run = self._client.get_run(ids.child)
        stage = run.data.tags["metaloom.stage"]
        rows = [
            Metric(_name(f"{stage}.{name}"), value, run.info.start_time, 0)
            for name, value in run.data.metrics.items()
            if not name.startswith("system/")
        ]
        for first in range(0, len(rows), METRICS_IN_A_BATCH):
            self._client.log_batch(ids.parent, metrics=rows[first : first + METRICS_IN_A_BATCH])

    def _find(self, tags: Mapping[str, str], *conditions: str) -> str | None:
        clauses = [
            *conditions,
            *(f"tags.`{_name(key)}` = '{_quoted(value)}'" for key, value in tags.items()),
        ]
        found = self._search(" and ".join(clauses), limit=1)
        return str(found[0].info.run_id) if found else None

    def _search(self, condition: str, limit: int = 1000) -> list[Any]:
        order = ["attributes.start_time DESC"]
        return list(
            self._client.search_runs(
                [self._experiment], condition, max_results=limit, order_by=order
            )
        )

    def _log_in_batches(
        self,
        run_id: str,
        *,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Param, RunTag

        entries = [Param(_name(key), value[:6000]) for key, value in (params or {}).items()]
        for first in range(0, len(entries), ENTRIES_IN_A_BATCH):
            self._client.log_batch(run_id, params=entries[first : first + ENTRIES_IN_A_BATCH])
        labels = [RunTag(_name(key), value[:8000]) for key, value in (tags or {}).items()]
        for first in range(0, len(labels), ENTRIES_IN_A_BATCH):
            self._client.log_batch(run_id, tags=labels[first : first + ENTRIES_IN_A_BATCH])

    def _watch_system(self, run_id: str) -> None:
        """Sample the machine while the stage runs; MLflow's own thread ends with its server."""
        thread = None if self._monitor is None else self._monitor._process
        if self._late or (thread is not None and thread.is_alive()):
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        kind: Any = SystemMetricsMonitor  # it has no types
        again = self._monitor is not None
        self._monitor = kind(run_id, sampling_interval=SYSTEM_METRICS_SECONDS, resume_logging=again)
        self._monitor.start()


def _is_run_of(run: Any, stage: str, outputs: Mapping[str, str]) -> bool:
    """Whether a run is this stage's.

    One item of a `matrix` stage (`pretrain@conv4`) may call itself that, or just `pretrain`; then
    it is known by its outputs.
    """
    name, own = stage.partition("@")[0], run.data.tags.get("metaloom.stage")
    wrote_it = any(_name(f"output.{path}") in run.data.tags for path in outputs)
    return own == stage or (own == name and wrote_it)


def _name(text: str) -> str:
    """A name that MLflow takes: it refuses all but word characters and `/.-: `."""
    return re.sub(r"[^/\w.\- :]", ":", text)[:MAX_NAME_CHARACTERS]


def _quoted(value: str) -> str:
    """A value that may stand in a search condition: ours hold no quotes, a user's key might."""
    return value.replace("'", "_")


def _datasets(run: RunStart) -> list[Any]:
    from mlflow.entities import Dataset, DatasetInput

    return [
        DatasetInput(
            Dataset(
                name=item.name,
                digest=item.digest[:DIGEST_CHARACTERS],
                source_type="local",
                source=json.dumps({"uri": item.source, "sha256": item.digest}),
            )
        )
        for item in run.inputs
    ]
