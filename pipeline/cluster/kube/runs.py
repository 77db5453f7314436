"""What retraining runs there are, and how far each is."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from pipeline.cluster.kube.api import Kube
from pipeline.cluster.kube.errors import ApiError, MissingError
from pipeline.cluster.kube.kinds import (
    COMMIT_NOTE,
    CRON_JOBS,
    EVENTS,
    JOBS,
    LEASES,
    PODS,
    PROGRESS_NOTE,
    RETRAIN,
)
from pipeline.cluster.kube.lease import holder_of
from pipeline.cluster.kube.retraining import is_ours, state_of, why_failed
from pipeline.cluster.kube.trouble import job_trouble, pod_trouble

_HEADS = ("RUN", "STATE", "STAGE", "STEP", "TASKS/S", "ETA", "AGE")


@dataclass(frozen=True)
class Run:
    """One line of `metaloom cluster status`."""

    run: str
    state: str
    age_seconds: float
    commit: str | None = None
    stage: str | None = None
    step: int | None = None
    num_steps: int | None = None
    tasks_per_second: float | None = None
    eta_seconds: float | None = None
    trouble: str | None = None
    """What keeps it from running, or ended it."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def list_runs(kube: Kube, *, now: float | None = None) -> list[Run]:
    """All runs, the newest first."""
    jobs = sorted(
        (job for job in kube.select(JOBS) if is_ours(job)),
        key=lambda job: (job["metadata"]["creationTimestamp"], job["metadata"]["name"]),
        reverse=True,
    )
    holder, progress = _progress(kube)
    now = time.time() if now is None else now
    return [
        _run(kube, job, progress if job["metadata"]["name"] == holder else {}, now) for job in jobs
    ]


def _progress(kube: Kube) -> tuple[str, dict[str, Any]]:
    """Who holds the Lease, and how far it says that it is."""
    try:
        lease = kube.get(LEASES, RETRAIN)
    except MissingError:
        return "", {}
    told = (lease["metadata"].get("annotations") or {}).get(PROGRESS_NOTE) or "{}"
    try:
        found = json.loads(told)
    except ValueError:
        found = {}
    return holder_of(lease), found if isinstance(found, dict) else {}


def _run(kube: Kube, job: Mapping[str, Any], progress: Mapping[str, Any], now: float) -> Run:
    metadata, state = job["metadata"], state_of(job)
    trouble = trouble_of(kube, job) if state in ("waiting", "running", "failed") else None
    step, steps, pace = (
        _number(progress.get(key)) for key in ("step", "num_steps", "tasks_per_second")
    )
    stage = progress.get("stage")
    return Run(
        run=metadata["name"],
        state=state,
        age_seconds=round(now - _seconds(metadata["creationTimestamp"]), 1),
        commit=(metadata.get("annotations") or {}).get(COMMIT_NOTE),
        stage=str(stage) if stage else None,
        step=None if step is None else int(step),
        num_steps=None if steps is None else int(steps),
        tasks_per_second=pace,
        eta_seconds=_seconds_left(progress, step, steps, pace),
        trouble=trouble or (why_failed(job) if state == "failed" else None) or None,
    )


def _seconds_left(
    progress: Mapping[str, Any], step: float | None, steps: float | None, pace: float | None
) -> float | None:
    """As the stage says; else from its rate: what it counts as steps are tasks."""
    told = _number(progress.get("eta_seconds"))
    if told is not None or step is None or steps is None or not pace:
        return told
    return round((steps - step) / pace, 1)


def pods_of(kube: Kube, job: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A Job's pods, the oldest first; of those of one second, the ended ones."""

    def age(pod: Mapping[str, Any]) -> tuple[str, bool, str]:
        over = (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
        return pod["metadata"]["creationTimestamp"], not over, pod["metadata"]["name"]

    labels = f"batch.kubernetes.io/controller-uid={job['metadata']['uid']}"
    return sorted(kube.select(PODS, labels=labels), key=age)


def trouble_of(kube: Kube, job: Mapping[str, Any]) -> str | None:
    """Why a Job does not run, or failed: from its newest pod, or from its events."""
    pods = pods_of(kube, job)
    if not pods:
        return job_trouble(events_of(kube, job["metadata"]["name"], "Job"))
    newest = pods[-1]
    return pod_trouble(newest, events_of(kube, newest["metadata"]["name"], "Pod"))


def events_of(kube: Kube, name: str, kind: str) -> list[dict[str, Any]]:
    """Events about one object, the oldest first; none where we may not read them."""
    fields = f"involvedObject.kind={kind},involvedObject.name={name}"
    with suppress(ApiError):
        found = kube.select(EVENTS, fields=fields)
        return sorted(found, key=lambda e: e.get("lastTimestamp") or e.get("eventTime") or "")
    return []


def schedule_line(kube: Kube) -> str:
    """When the next runs are; one line."""
    try:
        spec = kube.get(CRON_JOBS, RETRAIN)["spec"]
    except MissingError:
        return f"no CronJob {RETRAIN}: apply the manifests (infra/kubernetes)"
    if spec.get("suspend"):
        return "not scheduled; begin with `metaloom cluster schedule CRON`"
    return f"scheduled: {spec['schedule']} ({spec.get('timeZone') or 'UTC'})"


def as_table(runs: Sequence[Run], *, width: int = 80) -> str:
    """Runs as a table that fits the width; what ails one stands below its line."""
    rows = [_HEADS, *(_cells(run) for run in runs)]
    lengths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS))]
    lengths[0] = max(8, min(lengths[0], width - sum(lengths[1:]) - len(_HEADS) + 1))
    lines = []
    for index, row in enumerate(rows):
        cells = [
            _cut(cell, length).ljust(length) for cell, length in zip(row, lengths, strict=True)
        ]
        lines.append(" ".join(cells).rstrip()[:width])
        if index and (trouble := runs[index - 1].trouble):
            lines += _wrapped(trouble, width)
    return "\n".join(lines)


def _cells(run: Run) -> tuple[str, ...]:
    step = "" if run.step is None else str(run.step)
    if step and run.num_steps:
        step = f"{run.step}/{run.num_steps}"
    pace = "" if run.tasks_per_second is None else f"{run.tasks_per_second:.4g}"
    eta = "" if run.eta_seconds is None else span(run.eta_seconds)
    return (run.run, run.state, run.stage or "", step, pace, eta, span(run.age_seconds))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, initial_indent="  ! ", subsequent_indent="    ")


def span(seconds: float) -> str:
    """`45s`, `12m`, `3h`, `5d`."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size * 1.5 or (seconds >= size and unit == "m"):
            return f"{seconds / size:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()
